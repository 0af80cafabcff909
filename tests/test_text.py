"""What `hf_topk.text` reads, what it refuses and how it cuts windows."""

import logging
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_topk import text
from hf_topk.errors import InputError
from hf_topk.text import Window, fingerprint, make_windows, read_documents

BEGIN = 0
WORDS = 400


def write(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def write_parquet(path: Path, columns: dict) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def check_refused(source: str | Path, *parts: str) -> str:
    """Check that a source is refused in one line that holds the parts, and return the line."""
    with pytest.raises(InputError) as caught:
        read_documents(str(source))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


# Formats

BYTE_ORDER_MARK = "\ufeff"
READABLE = {
    "a.txt": ({"a.txt": BYTE_ORDER_MARK + "Étude\r\nno. 1\n"}, ["Étude\nno. 1\n"]),
    "a.MD": ({"a.MD": "# Title\n"}, ["# Title\n"]),
    "a.jsonl": ({"a.jsonl": BYTE_ORDER_MARK + '{"text": "1", "n": "x"}\n \n\n{"text": ""}\n'}, ["1"]),
    "c.jsonl": ({"c.jsonl": '{"body": null}\n{"n": 1, "body": "é\\n2"}'}, ["é\n2"]),
    # Half a surrogate pair, which no tokenizer takes, then a whole one.
    "b.jsonl": ({"b.jsonl": r'{"text": "a \ud83d b \ud83d\ude00"}'}, ["a ? b 😀"]),
    # In depth, sorted, without hidden files.
    ".": (
        {name: name for name in ["b.txt", "a/2.md", "a/1.txt", ".no.txt", ".git/no.txt", "a/.x/no.txt", "no.py"]}
        | {"c.jsonl": '{"text": "c"}\n', "empty.txt": ""},
        ["a/1.txt", "a/2.md", "b.txt", "c"],
    ),
}


@pytest.mark.parametrize("name", READABLE)
def test_readable(tmp_path, name):
    files, expected = READABLE[name]
    write(tmp_path, files)
    assert read_documents(str(tmp_path / name)) == expected


@pytest.mark.parametrize("column", ["text", "body"])
def test_parquet_row_is_a_document(tmp_path, column):
    file = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3, 4], column: ["one", None, " ", "två"]})
    assert read_documents(str(file)) == ["one", "två"]


def test_parquet_reads_every_type_of_string(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array(["one", "two", "one"])
    for body in (column.dictionary_encode(), column.cast(pyarrow.large_string())):
        file = write_parquet(tmp_path / "a.parquet", {"body": body, "tags": [["x"], ["y"], []]})
        assert read_documents(str(file)) == ["one", "two", "one"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert read_documents("~/a.txt") == ["home"]


@pytest.mark.parametrize(
    ("files", "expected", "is_cut"),
    [
        ({"a.txt": "x" * 10}, ["x" * 10], False),
        ({"a.txt": "ééééxé"}, ["ééééx"], True),  # 11 bytes: the last character does not fit whole
        ({"a.txt": "x" * 30, "b.txt": "y"}, ["x" * 10], True),
        ({"a.txt": "aaaaaa", "b.txt": "bbbbbb", "c.txt": "c"}, ["aaaaaa", "bbbbbb"], True),
    ],
)
def test_reading_stops_at_the_limit(tmp_path, monkeypatch, caplog, files, expected, is_cut):
    monkeypatch.setattr(text, "TEXT_LIMIT", 10)
    write(tmp_path, files)
    assert read_documents(str(tmp_path)) == expected
    assert ("not the rest" in caplog.text) is is_cut


# Bad input

REFUSED = {
    "empty text": ({"a.txt": ""}, "a.txt", "is empty"),
    "empty lines": ({"a.jsonl": ""}, "a.jsonl", "is empty"),
    "empty table": ({"a.parquet": ""}, "a.parquet", "is empty"),
    "white text": ({"a.txt": " \n\t\n"}, "a.txt", "only white space"),
    "white lines": ({"a.jsonl": "\n \n"}, "a.jsonl", "only white space"),
    "white documents": ({"a.jsonl": '{"text": " "}'}, "a.jsonl", "only white space"),
    "white folder": ({"a/a.txt": ""}, "a", "only white space"),
    "folder without text": ({"a/a.py": "x", "a/.b.txt": "x"}, "a", "no readable text file", ".txt, .md, .jsonl and"),
    "unknown ending": ({"a.py": "x"}, "a.py", "unknown ending", ".parquet"),
    "near name": ({"books.txt": "x", "other.txt": "x"}, "boks.txt", "(did you mean books.txt?)"),
    "near name in a folder": ({"a/books.txt": "x"}, "./a/boks.txt", "did you mean a/books.txt?"),
    "missing folder": ({}, "nowhere/a.txt", "(nor a folder 'nowhere')"),
    "long name": ({}, "x" * 5000 + ".txt", "File name too long"),
    "unknown home": ({}, "~no-such-user/a.txt", "cannot be read", "home"),
    "NUL in the name": ({}, "a\0b.txt", "There is no file or folder"),
    "broken line": ({"a.jsonl": '{"text": "x"}\n\n{"text'}, "a.jsonl", "line 3: broken JSON (Unterminated string"),
    "deep line": ({"a.jsonl": "[" * 100_000}, "a.jsonl", "line 1: broken JSON"),
    "long number": ({"a.jsonl": '{"n": ' + "9" * 10_000 + "}"}, "a.jsonl", "line 1: broken JSON"),
    "no object": ({"a.jsonl": '["x"]'}, "a.jsonl", "line 1: no JSON object"),
    "text is a number": ({"a.jsonl": '{"text": 5}'}, "a.jsonl", "line 1: 'text' holds no string but int"),
    "no key": ({"a.jsonl": "{}"}, "a.jsonl", "keys found (none)"),
    "no string": ({"a.jsonl": '{"n": 1}'}, "a.jsonl", "keys found ('n')", "none holds strings"),
    "two strings": ({"a.jsonl": '{"q": "x", "a": "y"}'}, "a.jsonl", "keys found ('q', 'a')", "several hold strings"),
    "foreign parquet": ({"a.parquet": "no parquet"}, "a.parquet", "a.parquet is a damaged parquet file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, monkeypatch, case):
    files, source, *parts = REFUSED[case]
    if source.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    write(tmp_path, files)
    check_refused(source, *parts)


@pytest.mark.parametrize(
    "name", ["bok.txt", "./book", "a/b/c", "~/book", "boo k", "a\\b", "data.json", "", " ", "a\nb"]
)
def test_name_that_looks_like_a_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    check_refused(name, "There is no file or folder", ".jsonl", "data set")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(("bad", "what"), [(b"\0", "binary"), (b"\xff", "not UTF-8"), (b"\xe9", "not UTF-8")])
def test_binary_file_names_the_byte(tmp_path, name, bad, what):
    write(tmp_path, {name: b'{"text": "x"}\n{"text": "' + bad + b'"}\n'})
    check_refused(tmp_path / name, name, what, "byte offset 24")


def test_unreadable_file(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    for path in (tmp_path / "a.txt", tmp_path / "folder"):
        path.mkdir() if path.suffix == "" else path.write_text("x")
        path.chmod(0)
        check_refused(path, str(path), "Permission denied", "permissions")
        path.chmod(0o700)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_that_does_not_open(tmp_path, monkeypatch, name):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / name).write_text("x")
    monkeypatch.setattr(Path, "open", refuse)
    check_refused(tmp_path / name, name, "Permission denied", "permissions")


def test_broken_link_in_a_folder(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    check_refused(tmp_path, "a.txt", "No such file")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"n": [1]}, "keys found ('n')"),
        ({"q": ["x"], "a": ["y"]}, "keys found ('q', 'a')"),
        ({"tags": [["x"]]}, "keys found ('tags')"),
        ({"text": [1, 2]}, "no string but int"),
    ],
)
def test_parquet_without_a_text_column(tmp_path, columns, reason):
    check_refused(write_parquet(tmp_path / "a.parquet", columns), "a.parquet", reason)


def test_damaged_parquet(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"text": [f"text {i}" for i in range(1000)]})
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4] + bytes(196) + whole[200:]):
        file.write_bytes(damaged)
        check_refused(file, "a.parquet", "damaged parquet")


def test_pyarrow_missing(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    check_refused(tmp_path / "a.parquet", "pyarrow", "pip install 'hf-topk[datasets]'")


@settings(max_examples=50, deadline=None)
@given(content=st.binary(min_size=1), ending=st.sampled_from(["txt", "jsonl"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, ending):
    file = tmp_path_factory.mktemp("bytes") / f"a.{ending}"
    file.write_bytes(content)
    try:
        assert all(document.strip() for document in read_documents(str(file)))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017


# Data sets


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `load_dataset`: streams `hub.rows` or raises `hub.error`; `hub.calls` is what was asked for."""
    datasets = pytest.importorskip("datasets")

    class Hub:
        def __init__(self):
            self.rows, self.error, self.calls = [], None, []

        def load_dataset(self, name, config, *, split, streaming):
            self.calls.append((name, config, split, streaming))
            if self.error:
                raise self.error
            if isinstance(self.rows, list):
                return datasets.Dataset.from_list(self.rows).to_iterable_dataset()
            return datasets.IterableDataset.from_generator(self.rows)  # its columns are not known beforehand

    stand_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    return stand_in


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("wikitext", ("wikitext", None, "train", True)),
        ("owner/set-1.0", ("owner/set-1.0", None, "train", True)),
        ("owner/set:en", ("owner/set", "en", "train", True)),
        ("owner/set:20231101.en:test", ("owner/set", "20231101.en", "test", True)),
        ("owner/set::validation", ("owner/set", None, "validation", True)),
    ],
)
def test_data_set_name(hub, source, call):
    hub.rows = [{"text": "one", "n": 1}, {"text": " ", "n": 2}, {"text": "two", "n": 3}]
    assert read_documents(source) == ["one", "two"]
    assert hub.calls == [call]


def test_data_set_stops_at_the_limit(hub, monkeypatch):
    monkeypatch.setattr(text, "TEXT_LIMIT", 10)
    hub.rows = [{"body": "x" * 6} for _ in range(100)]
    assert read_documents("owner/set") == ["x" * 6] * 2


def test_data_set_without_a_text_key(hub):
    hub.rows = [{"q": "x", "a": "y"}]
    assert check_refused("owner/set", "'q', 'a'").startswith("Data set owner/set, row 1: no 'text'")


ERRORS = [
    ("builtins", "ConnectionError", "Couldn't reach 'owner/set' on the Hub (LocalEntryNotFoundError)"),
    ("builtins", "ValueError", "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
    ("builtins", "RuntimeError", "Dataset scripts are no longer supported, but found set.py"),
    ("builtins", "ImportError", "To support decoding images, please install 'Pillow'."),
    ("datasets.exceptions", "DatasetNotFoundError", "Dataset 'owner/set' doesn't exist on the Hub"),
    ("huggingface_hub.errors", "HTTPError", "Name or service not known"),
    ("huggingface_hub.errors", "OfflineModeIsEnabled", "offline mode is enabled"),
    ("pyarrow", "ArrowInvalid", "Not an Arrow file"),
]


@pytest.mark.parametrize(("module", "name", "message"), ERRORS)
def test_data_set_that_cannot_be_read(hub, module, name, message):
    hub.error = getattr(pytest.importorskip(module), name)(message)
    with pytest.raises(InputError) as caught:
        read_documents("owner/set")
    assert caught.value.__cause__ is hub.error
    one_line = " ".join(message.split())
    check_refused("owner/set", "no file or folder 'owner/set'", one_line, "check the name", "network", "give a file")


def test_data_set_that_breaks_off(hub):
    def rows():
        yield {"body": "one"}
        raise ConnectionError("the line went dead")

    hub.rows = rows
    check_refused("owner/set", "the line went dead")


def test_data_set_offline(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    check_refused("owner/no-such-set", "Couldn't reach 'owner/no-such-set' on the Hub", "network")


@pytest.mark.parametrize("name", ["text", "json", "csv"])
def test_data_set_named_like_a_file_reader_does_not_read_the_folder(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    check_refused(name, "There is no file or folder", "check the path")
    assert not hub.calls


def test_datasets_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikitexts").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    check_refused("wikitext", "'wikitext'", "did you mean wikitexts?", "pip install 'hf-topk[datasets]'")


# Fingerprint


def test_fingerprint_tells_order_and_boundaries():
    different = [
        [],
        [""],
        ["", ""],
        ["ab"],
        ["a", "b"],
        ["b", "a"],
        ["ab", ""],
        ["", "ab"],
        ["aB"],
        ["a\nb"],
        ["\ud83d"],
    ]
    prints = [fingerprint(documents) for documents in different]
    assert len(set(prints)) == len(different)
    assert all(len(value) == 64 and int(value, 16) >= 0 for value in prints)
    assert fingerprint(iter(["a", "b"])) == fingerprint(("a", "b"))


# Windows


def word_tokenizer(template: str = "<begin> $A") -> PreTrainedTokenizerFast:
    """A tokenizer that has one token a word, "w0" to "w399", and the special tokens of a template."""
    vocabulary = {"<begin>": BEGIN, "<end>": 1, "<unknown>": 2} | {f"w{n}": n + 3 for n in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<begin>", BEGIN), ("<end>", 1)]
    backend.post_processor = processors.TemplateProcessing(single=template, pair="$A $B", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<begin>", unk_token="<unknown>")


def numbered_documents(lengths: list[int]) -> list[str]:
    """Documents of so many words, in which no word comes twice."""
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


def without_a_last_single_token(ids: list[int], window_length: int) -> list[int]:
    return ids[:-1] if len(ids) % window_length == 1 else ids


@given(lengths=LENGTHS, window_length=LENGTH, seed=SEED, limit=st.sampled_from([None, 10_000]))
def test_windows_make_up_the_documents(lengths, window_length, seed, limit):
    documents = numbered_documents(lengths)
    windows = make_windows(documents, TOKENIZER, window_length, limit, seed)
    assert all(2 <= len(window.token_ids) <= window_length for window in windows)
    assert [window.document for window in windows] == sorted(window.document for window in windows)
    for index, ids in by_document(windows).items():
        full = TOKENIZER(documents[index])["input_ids"]
        assert full[0] == BEGIN
        assert ids == without_a_last_single_token(full, window_length)
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
    starts = {(window.document, window.token_ids[:2]) for window in all_windows}
    assert all((window.document, window.token_ids[:2]) in starts for window in windows)
    assert len(Counter(windows) - all_windows) <= 1  # the one that was cut to fit

    if limit >= window_length * len(documents):
        assert len(by_document(windows)) == len(documents)


@given(seed=SEED, window_length=LENGTH, rounds=st.integers(min_value=1, max_value=3))
def test_sample_takes_documents_in_turn(seed, window_length, rounds):
    documents = numbered_documents([window_length * 3] * 5)
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
def test_pieces_change_no_token(monkeypatch, piece):
    monkeypatch.setattr(text, "CHARACTERS_PER_PIECE", piece)
    monkeypatch.setattr(text, "PIECES_PER_BATCH", 3)
    tokenizer = byte_tokenizer()
    documents = [PROSE, "", "the mat", PROSE[100:]]
    windows = make_windows(documents, tokenizer, 10**6, None, 0)
    expected = {index: tokenizer(document)["input_ids"] for index, document in enumerate(documents) if document}
    assert by_document(windows) == expected


def test_text_without_spaces_is_cut_where_it_must(monkeypatch):
    monkeypatch.setattr(text, "CHARACTERS_PER_PIECE", 10)
    tokenizer = byte_tokenizer()
    document = "猫" * 95
    ids = by_document(make_windows([document], tokenizer, 7, None, 0))[0]
    assert tokenizer.decode(ids) == document[: len(tokenizer.decode(ids))]


def test_no_more_is_tokenised_than_the_sample_needs(monkeypatch):
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


def test_progress_is_shown_when_slow_alone(monkeypatch, capsys):
    make_windows(["w1 w2"], TOKENIZER, 8, None, 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(text, "SECONDS_BEFORE_PROGRESS", -1)
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
def test_nothing_to_cut(documents, window_length, limit, part):
    with pytest.raises(InputError, match=part):
        make_windows(documents, word_tokenizer("$A"), window_length, limit, 0)
