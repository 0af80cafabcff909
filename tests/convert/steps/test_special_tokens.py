"""Special tokens: end tokens come first, then named and unnamed ones."""

from pathlib import Path
from typing import Any

import pytest
from support.command_line import check_refused
from support.tiny_models import QUICK, character_tokenizer, tiny_checkpoint, tiny_dense, tiny_text, tiny_tokenizer
from transformers import AddedToken, GenerationConfig

from hf_topk import InputError, TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert, processes
from hf_topk.convert.steps.special_tokens import check_ends_always_on, special_ids, unused_ids


def converted(dense: Any, tokenizer: Any, num_always_on: int, text: Path) -> TopKExpertsForCausalLM:
    recipe = Recipe(text=str(text), num_always_on=num_always_on, num_experts_per_tok=2, **QUICK)
    return convert(dense, tokenizer, recipe).model


def test_end_tokens_come_first(tmp_path: Path) -> None:
    dense, tokenizer = tiny_dense(), tiny_tokenizer()
    dense.generation_config.eos_token_id = [7, 0, 42]
    assert special_ids(dense, tokenizer, 8) == [7, 0, 42, 1]
    assert special_ids(dense, None, 8) == [7, 0, 42]
    text = tiny_text(tmp_path / "text.jsonl")
    for num_always_on in (3, 4, 9):
        always_on = converted(dense, tokenizer, num_always_on, text).head.always_on_ids.tolist()
        assert {7, 0, 42} <= set(always_on)
        assert len(always_on) == num_always_on
    dense.generation_config.eos_token_id = None
    assert special_ids(dense, tokenizer, 8) == [0, 1]


def test_unnamed_special_tokens_come_last_and_are_limited(tmp_path: Path) -> None:
    dense, tokenizer = tiny_dense(), tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(f"w{number}", special=True) for number in range(20, 60)])
    tokenizer.add_tokens([AddedToken("w70", special=False)])
    assert tokenizer.convert_tokens_to_ids("w20") == 22
    assert not {22, 61} & set(tokenizer.all_special_ids)
    assert special_ids(dense, tokenizer, 16) == [0, 1, 22, 23, 24, 25]
    assert special_ids(dense, tokenizer, 400) == [0, 1, *range(22, 62)]
    always_on = converted(dense, tokenizer, 16, tiny_text(tmp_path / "text.jsonl")).head.always_on_ids.tolist()
    assert {0, 1, 22, 23, 24, 25} <= set(always_on)


def test_always_on_tokens_for_only_some_end_tokens_are_refused(tmp_path: Path) -> None:
    dense, text = tiny_dense(), tiny_text(tmp_path / "text.jsonl")
    dense.generation_config.eos_token_id = [7, 0, 42]
    with pytest.raises(InputError, match=r"num_always_on is 2, fewer than the 3 tokens that end a text.*or 0 for none"):
        converted(dense, tiny_tokenizer(), 2, text)
    assert converted(dense, tiny_tokenizer(), 0, text).head.num_always_on == 0


def test_unused_ids_are_those_without_a_token() -> None:
    tokenizer = tiny_tokenizer()
    assert unused_ids(tokenizer, 100) == []
    assert unused_ids(tokenizer, 98) == []  # some tokens are beyond the head
    assert unused_ids(tokenizer, 104) == [100, 101, 102, 103]
    tokenizer.add_tokens(["new"])
    assert unused_ids(tokenizer, 104) == [101, 102, 103]
    assert unused_ids(character_tokenizer(), 100) == [97, 98, 99]
    assert unused_ids(None, 104) == []


def test_end_tokens_outside_the_vocabulary_are_ignored() -> None:
    check_ends_always_on(1, [7, 7, -1, 100], vocab_size=100)
    with pytest.raises(InputError):
        check_ends_always_on(1, [7, 99], vocab_size=100)


@pytest.mark.parametrize("is_written", [True, False], ids=["generation_config.json", "config.json"])
def test_refused_before_weights_are_read(
    is_written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = tiny_dense()
    dense.config.eos_token_id = [0, 5]
    tiny_checkpoint(tmp_path / "model", dense)
    monkeypatch.setattr(processes, "load_dense", None)
    (tmp_path / "model" / "generation_config.json").unlink()
    ends = 2
    if is_written:
        GenerationConfig(eos_token_id=[7, 0, 42]).save_pretrained(tmp_path / "model")
        ends = 3
    arguments = ("convert", "model", "out", "--expert-size", 16, "--num-always-on", 1)
    check_refused(monkeypatch, capsys, *arguments, parts=("num_always_on is 1", f"choose {ends} or more"))
