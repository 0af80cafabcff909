"""`hf_topk.documents`: readable and refused sources."""

import codecs
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.documents import check_unreadable

from hf_topk import documents
from hf_topk.documents import Chat, fingerprint, read_documents
from hf_topk.model.errors import InputError

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


# Formats

BYTE_ORDER_MARK = "\ufeff"
READABLE = {
    "a.txt": ({"a.txt": BYTE_ORDER_MARK + "Étude\r\nno. 1\n"}, ["Étude\nno. 1\n"]),
    "a.MD": ({"a.MD": "# Title\n"}, ["# Title\n"]),
    "a.jsonl": ({"a.jsonl": BYTE_ORDER_MARK + '{"text": "1", "n": "x"}\n \n\n{"text": ""}\n'}, ["1"]),
    "c.jsonl": ({"c.jsonl": '{"body": null}\n{"n": 1, "body": "é\\n2"}'}, ["é\n2"]),
    "d.jsonl": (
        {
            "d.jsonl": r'{"n": "1", "messages": [{"role": "user", "content": "\ud83d?"}]}'
            + '\n{"messages": []}\n{"text": "1"}'
        },
        [Chat((("user", "??"),)), "1"],
    ),
    # Half a surrogate pair, which no tokenizer takes, then a whole one.
    "b.jsonl": ({"b.jsonl": r'{"text": "a \ud83d b \ud83d\ude00"}'}, ["a ? b 😀"]),
    "e.json": (
        {"e.json": '[{"text": "1", "n": 2},\n"2", {"messages": [{"role": "user", "content": "Hi"}]}, {"body": ""}]'},
        ["1", "2", Chat((("user", "Hi"),))],
    ),
    # As spreadsheets write it: with a byte order mark, and what holds commas, quotes or lines in quotes.
    "f.CSV": (
        {"f.CSV": BYTE_ORDER_MARK + 'id,text\r\n1,plain\r\n2,"a, ""b""\nc"\r\n3,\r\n4\r\n5,' + "long " * 30_000},
        ["plain", 'a, "b"\nc', "long " * 30_000],
    ),
    # UTF-16 with a byte order mark, in either order; U+2028 and U+0A0A are no ends of lines.
    "g.txt": ({"g.txt": (BYTE_ORDER_MARK + "Étude\r\n😀").encode("utf-16-le")}, ["Étude\n😀"]),
    "g.jsonl": (
        {"g.jsonl": (BYTE_ORDER_MARK + '{"text": "1\u2028\u0a0a"}\r\n{"text": "2"}').encode("utf-16-be")},
        ["1\u2028\u0a0a", "2"],
    ),
    "g.json": ({"g.json": '["😀"]'.encode("utf-16")}, ["😀"]),
    "g.csv": ({"g.csv": "text\nÉtude\n".encode("utf-16")}, ["Étude"]),
    # In depth, sorted, without hidden files.
    ".": (
        {name: name for name in ["b.txt", "a/2.md", "a/1.txt", ".no.txt", ".git/no.txt", "a/.x/no.txt", "no.py"]}
        | {"c.jsonl": '{"text": "c"}\n', "empty.txt": "", "settings.json": "{}", "numbers.csv": "1,2\n"},
        ["a/1.txt", "a/2.md", "b.txt", "c"],
    ),
}


@pytest.mark.parametrize("name", READABLE)
def test_readable_files(tmp_path, name):
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
    monkeypatch.setattr(documents, "TEXT_LIMIT", 10)
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
    "folder without text": (
        {"a/a.py": "x", "a/.b.txt": "x", "a/c.json": "[]"},
        "a",
        "no readable text file",
        "given by name",
    ),
    "unknown ending": ({"a.py": "x"}, "a.py", "unknown ending", ".parquet"),
    "near name": ({"books.txt": "x", "other.txt": "x"}, "boks.txt", "(did you mean books.txt?)"),
    "near name in a folder": ({"a/books.txt": "x"}, "./a/boks.txt", "did you mean a/books.txt?"),
    "missing folder": ({}, "nowhere/a.txt", "(nor a folder 'nowhere')"),
    "long name": ({}, "x" * 5000 + ".txt", "File name too long"),
    "unknown home": ({}, "~no-such-user/a.txt", "cannot be read", "home"),
    "NUL in the name": ({}, "a\0b.txt", "There is no file or folder"),
    "broken line": ({"a.jsonl": '{"text": "x"}\n\n{"text'}, "a.jsonl", "line 3: invalid JSON (Unterminated string"),
    "deep line": ({"a.jsonl": "[" * 100_000}, "a.jsonl", "line 1: invalid JSON"),
    "long number": ({"a.jsonl": '{"n": ' + "9" * 10_000 + "}"}, "a.jsonl", "line 1: invalid JSON"),
    "no object": ({"a.jsonl": '["x"]'}, "a.jsonl", "line 1: not a JSON object"),
    "text is a number": ({"a.jsonl": '{"text": 5}'}, "a.jsonl", "line 1: 'text' holds no string but int"),
    "no key": ({"a.jsonl": "{}"}, "a.jsonl", "keys found (none)"),
    "no string": ({"a.jsonl": '{"n": 1}'}, "a.jsonl", "keys found ('n')", "none holds strings"),
    "two strings": ({"a.jsonl": '{"q": "x", "a": "y"}'}, "a.jsonl", "keys found ('q', 'a')", "several hold strings"),
    "no list": ({"a.json": '{"text": "x"}'}, "a.json", "is not a JSON list", '[{"text": "..."}, ...]'),
    "lines in a .json": (
        {"a.json": '{"text": "x"}\n{"text": "y"}'},
        "a.json",
        "line 2: invalid JSON",
        "rename it to .jsonl",
    ),
    "list of numbers": ({"a.json": '["x", 5]'}, "a.json", "a.json, entry 2: not a JSON object"),
    "empty list": ({"a.json": "[]"}, "a.json", "holds no text"),
    "no text column": ({"a.csv": "id;text\n1;x\n"}, "a.csv", "no column 'text'", "('id;text')"),
    "no columns": ({"a.csv": "\n\n"}, "a.csv", "no column 'text'", "(none)"),
    "comma in a text": (
        {"a.csv": "id,text\n1,x\n2,a, b\n"},
        "a.csv",
        "line 3: more values than columns",
        "quote texts",
    ),
    "open quote": ({"a.csv": 'text\n"x\n'}, "a.csv", "invalid CSV (unexpected end of data)"),
    "torn UTF-16": ({"a.txt": b"\xff\xfex\0y"}, "a.txt", "is not UTF-16 text", "byte offset 4"),
    "half a surrogate pair": ({"a.csv": b"\xff\xfe\x3d\xd8x\0"}, "a.csv", "is not UTF-16 text", "byte offset 2"),
    "UTF-16 without a mark": ({"a.txt": "x".encode("utf-16-le")}, "a.txt", "is binary, not text"),
    "UTF-32": ({"a.txt": "x".encode("utf-32")}, "a.txt", "is binary, not text"),
    "foreign parquet": ({"a.parquet": "no parquet"}, "a.parquet", "a.parquet is a damaged parquet file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, monkeypatch, case):
    files, source, *parts = REFUSED[case]
    if source.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    write(tmp_path, files)
    check_unreadable(source, *parts)


@pytest.mark.parametrize(
    "name", ["bok.txt", "./book", "a/b/c", "~/book", "boo k", "a\\b", "data.json", "", " ", "a\nb"]
)
def test_a_missing_path_is_not_taken_for_a_data_set(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    check_unreadable(name, "There is no file or folder", ".jsonl", "data set")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(("bad", "what"), [(b"\0", "binary"), (b"\xff", "not UTF-8"), (b"\xe9", "not UTF-8")])
def test_binary_file_names_the_byte(tmp_path, name, bad, what):
    write(tmp_path, {name: b'{"text": "x"}\n{"text": "' + bad + b'"}\n'})
    check_unreadable(tmp_path / name, name, what, "byte offset 24")


def test_unreadable_file(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    for path in (tmp_path / "a.txt", tmp_path / "folder"):
        path.mkdir() if path.suffix == "" else path.write_text("x")
        path.chmod(0)
        check_unreadable(path, str(path), "Permission denied", "permissions")
        path.chmod(0o700)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch, name):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / name).write_text("x")
    monkeypatch.setattr(Path, "open", refuse)
    check_unreadable(tmp_path / name, name, "Permission denied", "permissions")


def test_broken_link_in_a_folder(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    check_unreadable(tmp_path, "a.txt", "No such file")


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
    check_unreadable(write_parquet(tmp_path / "a.parquet", columns), "a.parquet", reason)


def test_damaged_parquet(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"text": [f"text {i}" for i in range(1000)]})
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4] + bytes(196) + whole[200:]):
        file.write_bytes(damaged)
        check_unreadable(file, "a.parquet", "damaged parquet")


def test_pyarrow_missing(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    check_unreadable(tmp_path / "a.parquet", "pyarrow", "pip install 'hf-topk[datasets]'")


@settings(max_examples=50, deadline=None)
@given(
    content=st.binary(min_size=1) | st.binary().map(codecs.BOM_UTF16_LE.__add__),
    ending=st.sampled_from(["txt", "jsonl", "json", "csv"]),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, ending):
    file = tmp_path_factory.mktemp("bytes") / f"a.{ending}"
    file.write_bytes(content)
    try:
        assert all(document.strip() for document in read_documents(str(file)))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017


# Fingerprint


def test_fingerprint_depends_on_order_and_boundaries():
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


# Conversations


def test_reads_conversations_of_every_kind(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    write_parquet(tmp_path / "a.parquet", {"messages": [messages, None], "source": ["x", "y"]})
    chat = Chat((("user", "Hi"), ("assistant", "Hello")))
    assert read_documents(str(tmp_path / "a.parquet")) == [chat]
    assert fingerprint([chat]) != fingerprint([Chat(chat.messages[:1])])


@pytest.mark.parametrize("messages", ["1", '"x"', '["x"]', '[{"role": "user"}]', '[{"role": "user", "content": 1}]'])
def test_refuses_broken_conversations(messages, tmp_path):
    write(tmp_path, {"a.jsonl": f'{{"messages": {messages}}}'})
    check_unreadable(tmp_path / "a.jsonl", "a.jsonl, line 1", "'messages' must be a list of")
