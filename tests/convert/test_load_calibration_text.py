"""The calibration text: bundled texts and prompts, or a user's own."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tiny_models import (
    CHAT_TEMPLATE,
    tiny_text,
    tiny_tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_topk.convert import Recipe
from hf_topk.convert.load_calibration_text import PROMPTS, TEXTS, bundled_documents, calibration_windows
from hf_topk.documents import Document, read_documents


def words_of(documents: Sequence[Document]) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each word of the documents."""
    backend = Tokenizer(models.WordLevel(unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=10**6, special_tokens=["<unknown>"], show_progress=False)
    texts = [one if isinstance(one, str) else " ".join(content for _, content in one.messages) for one in documents]
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unknown>")


@pytest.mark.parametrize("chats", [False, True])
def test_models_with_a_chat_template_also_read_the_prompts(chats: bool) -> None:
    texts, prompts = read_documents(str(TEXTS)), read_documents(str(PROMPTS))
    tokenizer = words_of([*texts, *prompts])
    tokenizer.chat_template = CHAT_TEMPLATE if chats else None
    bundled = bundled_documents(tokenizer)
    assert [document for some in bundled.values() for document in some] == [*texts, *(prompts if chats else [])]
    windows, fingerprint = calibration_windows(tokenizer, Recipe(positions=9000, window_length=32))
    assert 8999 <= sum(len(window.token_ids) for window in windows) <= 9000
    assert {window.kind for window in windows} == set(bundled)
    assert ("chat" in bundled) == chats
    documents = {window.document for window in windows}
    assert set(range(len(texts))) <= documents  # each has a window
    assert (max(documents) >= len(texts)) == chats
    assert fingerprint == calibration_windows(tokenizer, Recipe(positions=99))[1]
    tokenizer.chat_template = None if chats else CHAT_TEMPLATE
    assert fingerprint != calibration_windows(tokenizer, Recipe(positions=99))[1]


def test_a_user_s_text_replaces_the_bundled_texts(tmp_path: Path) -> None:
    recipe = Recipe(text=str(tiny_text(tmp_path / "text.jsonl")), positions=200, window_length=32)
    windows, _ = calibration_windows(tiny_tokenizer(), recipe)
    assert {window.document for window in windows} == {0, 1, 2, 3}
    assert sum(len(window.token_ids) for window in windows) == 200


def test_conversations_are_read_through_the_chat_template(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": turns, "source": "w9"})] * 3))
    recipe = Recipe(text=str(tmp_path / "chats.jsonl"), positions=200, window_length=32)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<pad> {{ message.content }} {% endfor %}"
    windows, _ = calibration_windows(tokenizer, recipe)  # of three equal ones, one
    assert [tokenizer.decode(window.token_ids) for window in windows] == ["<pad> w5 w6 <pad> w7"]
