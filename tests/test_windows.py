"""`hf_topk.windows`: documents are split into windows."""

import logging
from collections import Counter, defaultdict
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_topk import progress
from hf_topk import windows as text
from hf_topk.documents import Chat
from hf_topk.model.errors import InputError
from hf_topk.windows import Window, distinct_positions, make_windows

BEGIN = 0
WORDS = 400


def word_tokenizer(template: str = "<begin> $A") -> PreTrainedTokenizerFast:
    """A tokenizer with a token per word, "w0" to "w399", and the special tokens of a template."""
    vocabulary = {"<begin>": BEGIN, "<end>": 1, "<unknown>": 2} | {f"w{n}": n + 3 for n in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<begin>", BEGIN), ("<end>", 1)]
    backend.post_processor = processors.TemplateProcessing(single=template, pair="$A $B", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<begin>", unk_token="<unknown>")


def numbered_documents(lengths: list[int]) -> list[str]:
    """Documents of these numbers of words, all different."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [
        " ".join(f"w{word}" for word in range(start, start + length))
        for start, length in zip(starts, lengths, strict=True)
    ]


def by_document(windows: list[Window]) -> dict[int, list[int]]:
    runs = defaultdict(list)
    for window in windows:
        runs[window.document].extend(window.token_ids)
    return dict(runs)


LENGTHS = st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=10)
LENGTH = st.integers(min_value=2, max_value=12)
SEED = st.integers(min_value=0, max_value=2**32)
TOKENIZER = word_tokenizer()


@given(lengths=LENGTHS, window_length=LENGTH, seed=SEED, limit=st.sampled_from([None, 10_000]))
def test_windows_make_up_the_documents(lengths, window_length, seed, limit):
    documents = numbered_documents(lengths)
    windows = make_windows(documents, TOKENIZER, window_length, limit, seed)
    assert all(2 <= len(window.token_ids) <= window_length for window in windows)
    assert [window.document for window in windows] == sorted(window.document for window in windows)
    for index, ids in by_document(windows).items():
        own = TOKENIZER(documents[index], add_special_tokens=False)["input_ids"]
        assert [token for token in ids if token != BEGIN] == own
    assert all(window.token_ids[0] == BEGIN and BEGIN not in window.token_ids[1:] for window in windows)
    assert len(by_document(windows)) == len(documents)


@given(lengths=LENGTHS, window_length=LENGTH, seed=SEED, limit=st.integers(min_value=2, max_value=150))
def test_sample_keeps_the_rules(lengths, window_length, seed, limit):
    documents = numbered_documents(lengths)
    all_windows = Counter(make_windows(documents, TOKENIZER, window_length, None, 0))
    windows = make_windows(documents, TOKENIZER, window_length, limit, seed)
    total = sum(len(window.token_ids) for window in windows)

    assert make_windows(documents, TOKENIZER, window_length, limit, seed) == windows
    assert min(limit - 1, sum(len(w.token_ids) * n for w, n in all_windows.items())) <= total <= limit
    assert all(2 <= len(window.token_ids) <= window_length for window in windows)
    words = [token for window in windows for token in window.token_ids if token != BEGIN]
    assert len(set(words)) == len(words)
    assert all(window.token_ids[0] == BEGIN for window in windows)
    starts = {(window.document, window.token_ids[:2]) for window in all_windows}
    assert all((window.document, window.token_ids[:2]) in starts for window in windows)
    assert len(Counter(windows) - all_windows) <= 1  # the one that was cut to fit

    if limit >= window_length * len(documents):
        assert len(by_document(windows)) == len(documents)


@given(seed=SEED, window_length=LENGTH, rounds=st.integers(min_value=1, max_value=3))
def test_sample_takes_documents_in_turn(seed, window_length, rounds):
    documents = numbered_documents([(window_length - 1) * 3] * 5)
    windows = make_windows(documents, TOKENIZER, window_length, rounds * 5 * window_length, seed)
    assert set(Counter(window.document for window in windows).values()) == {rounds}


def test_seeds_draw_different_windows():
    documents = numbered_documents([100, 100, 100])
    samples = {tuple(make_windows(documents, TOKENIZER, 10, 30, seed)) for seed in range(10)}
    assert len(samples) > 5
    firsts = Counter(make_windows(documents, TOKENIZER, 10, 10, seed)[0].document for seed in range(30))
    assert len(firsts) == 3


@pytest.mark.parametrize(
    ("template", "opening"), [("$A", []), ("<begin> $A", [0]), ("<begin> $A <end>", [0]), ("<end> <begin> $A", [1, 0])]
)
def test_only_opening_special_tokens_are_added(template, opening):
    windows = make_windows(["w0 w1", "w2 w3 unheard-of"], word_tokenizer(template), 8, None, 0)
    assert by_document(windows) == {0: [*opening, 3, 4], 1: [*opening, 5, 6, 2]}


@pytest.mark.parametrize("template", ["<begin> $A", "<end> <begin> $A"])
def test_every_window_begins_with_the_opening_tokens(template):
    tokenizer = word_tokenizer(template)
    opening = tokenizer("w0")["input_ids"][:-1]
    windows = make_windows(numbered_documents([9]), tokenizer, 5, None, 0)
    assert all(list(window.token_ids[: len(opening)]) == opening for window in windows)
    assert [token - 3 for window in windows for token in window.token_ids[len(opening) :]] == list(range(9))
    with (
        pytest.raises(InputError, match=f"window_length is 2: it must be {len(opening) + 1}")
        if len(opening) > 1
        else (nullcontext())
    ):
        make_windows(["w0 w1"], tokenizer, 2, None, 0)


def test_opening_tokens_are_not_added_to_a_text_that_has_them():
    windows = make_windows(["<begin> w0 w1", "w2"], TOKENIZER, 8, None, 0)
    assert by_document(windows) == {0: [BEGIN, 3, 4], 1: [BEGIN, 5]}


CHAT = Chat((("user", "w0 w1"), ("assistant", "w2")))
TURNS = "{% for message in messages %}{{ message.role }} {{ message.content }} <end> {% endfor %}"


@pytest.mark.parametrize(
    ("chat_template", "runs"),
    [
        (TURNS, [[2, 3, 4], [1, 2, 5], [1]]),  # the model has no opening in a chat, or none of its own
        ("{{ bos_token }} " + TURNS, [[0, 2, 3], [0, 4, 1], [0, 2, 5], [0, 1]]),
    ],
)
def test_windows_of_conversations_begin_as_the_chat_template(chat_template, runs):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = chat_template
    windows = make_windows([CHAT], tokenizer, 3, None, 0)
    assert [list(window.token_ids) for window in windows] == [run for run in runs if len(run) > 1]


def test_an_unanswered_conversation_ends_where_the_model_answers():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TURNS + "{{ 'w9' if add_generation_prompt }}"
    windows = make_windows([CHAT, Chat(CHAT.messages[:1])], tokenizer, 9, None, 0)
    assert [window.token_ids[-1] for window in windows] == [1, 12]


@given(runs=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=9))
def test_positions_with_the_same_tokens_before_them_count_once(runs):
    windows = distinct_positions([Window(number, tuple(run)) for number, run in enumerate(runs)])
    read = [one.token_ids[: end + 1] for one in windows for end in range(one.first, len(one.token_ids))]
    assert sorted(read) == sorted({tuple(run[: end + 1]) for run in runs for end in range(len(run))})
    assert sum(window.positions for window in windows) == len(read)
    assert all(len(window.followers) == window.positions > 0 for window in windows)
    assert windows == sorted(windows, key=lambda window: window.document)


@pytest.mark.parametrize(
    ("chat_template", "part"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{", "rejects a conversation"),
    ],
)
def test_refuses_chats_without_a_fitting_template(chat_template, part):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(InputError, match=part):
        make_windows(["w1 w2", CHAT], tokenizer, 8, None, 0)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat, and then the other cat sat there too. "] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16)


PROSE = "The cat sat on the mat;\n\nthen the other\tcat - the   third - sat there too. " * 20


@pytest.mark.parametrize("piece", [7, 20, 100, 10_000])
def test_tokenising_in_pieces_changes_no_token(monkeypatch, piece):
    monkeypatch.setattr(text, "CHARACTERS_PER_PIECE", piece)
    monkeypatch.setattr(text, "PIECES_PER_BATCH", 3)
    tokenizer = byte_tokenizer()
    documents = [PROSE, "", "the mat", PROSE[100:]]
    windows = make_windows(documents, tokenizer, 10**6, None, 0)
    expected = {index: tokenizer(document)["input_ids"] for index, document in enumerate(documents) if document}
    assert by_document(windows) == expected


def test_text_without_spaces_is_cut_at_the_piece_length(monkeypatch):
    monkeypatch.setattr(text, "CHARACTERS_PER_PIECE", 10)
    tokenizer = byte_tokenizer()
    document = "猫" * 95
    ids = by_document(make_windows([document], tokenizer, 7, None, 0))[0]
    assert tokenizer.decode(ids) == document[: len(tokenizer.decode(ids))]


def test_tokenises_little_more_than_the_sample(monkeypatch):
    seen = []

    def counting(texts, **options):
        seen.extend([texts] if isinstance(texts, str) else texts)
        return TOKENIZER(texts, **options)

    monkeypatch.setattr(text, "PIECES_PER_BATCH", 4)
    make_windows([f"w{n} w1 w2" for n in range(100)], counting, 8, 10, 0)
    assert len(seen) < 10


def test_no_warning_of_long_texts(caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        make_windows([PROSE, PROSE], byte_tokenizer(), 16, None, 0)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.text


def test_progress_is_shown_only_for_slow_steps(monkeypatch, capsys):
    make_windows(["w1 w2"], TOKENIZER, 8, None, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS_BEFORE_PROGRESS", -1)
    make_windows(["w1 w2"], TOKENIZER, 8, None, 0)
    assert "Tokenising: 5 characters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("documents", "window_length", "limit", "part"),
    [
        ([], 8, None, "empty"),
        ([""], 8, None, "too short"),
        (["w1", ""], 8, 10, "too short"),
        (["w1 w2"], 1, None, "window_length is 1"),
        (["w1 w2"], 8, 1, "max_positions is 1"),
        (["w1 w2"], 8, 0, "max_positions is 0"),
    ],
)
def test_texts_without_windows_are_refused(documents, window_length, limit, part):
    with pytest.raises(InputError, match=part):
        make_windows(documents, word_tokenizer("$A"), window_length, limit, 0)
