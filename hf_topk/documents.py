"""Reads documents from files, folders and data sets."""

import codecs
import csv
import difflib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .model.errors import InputError, one_line
from .pairs import PAIR_KEYS, Pair, holds_pairs, pair_of
from .progress import progress_once_slow

TEXT_LIMIT = 64 * 2**20  # bytes; far more than a conversion needs
CUT_WARNING = f"Reading the first {TEXT_LIMIT >> 20} MiB of %s, not the rest"
INSTALL_HINT = "pip install 'hf-topk[datasets]'"
ENDINGS_IN_FOLDERS = (".txt", ".md", ".jsonl", ".parquet")
ENDINGS = (*ENDINGS_IN_FOLDERS, ".json", ".csv")  # in folders, the last two seldom hold text
MESSAGES = "messages"  # the key of conversations
SUPPORTED = "supported are .txt, .md, .jsonl, .parquet, .json and .csv"
OTHER_FILE_ENDINGS = (".tsv", ".text", ".gz", ".zip", ".zst", ".html", ".xml", ".pdf", ".rst")
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
DATA_SET = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?", flags=re.ASCII)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """A conversation; a chat template turns it into text.

    Attributes:
        messages: pairs of role and content.
    """

    messages: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        """Characters of all messages."""
        return sum(len(content) for _, content in self.messages)


Document = str | Chat | Pair


def read_documents(source: str) -> list[Document]:
    """Read the documents of a text, the first 64 MiB of it.

    A .txt or .md file is one document. So is each line of a .jsonl file, each entry of the list in a .json file and
    each row of a .parquet file or data set: the text under "text", or else the conversation under "messages" (a list of
    {"role": ..., "content": ...}), or else the pair of "source" and an optional "target", or else the text under the
    only key that holds strings. Of a .csv file the column "text" is read. Files are UTF-8, or UTF-16 with a byte order
    mark. Blank documents are skipped.

    Args:
        source: a .txt, .md, .jsonl, .parquet, .json or .csv file; a folder of files of the first four kinds, searched
            recursively and in sorted order, without hidden files; or a data set: "name", "name:config",
            "name:config:split" or "name::split". The default split is "train".

    Returns:
        The documents, in order; at least one.

    Raises:
        InputError: there is no such source, it cannot be read, or it holds no text.
    """
    documents: list[Document] = []
    size = 0
    with progress_once_slow(f"Reading {_shown(source)}", TEXT_LIMIT, "bytes") as advance:
        for document in _documents_of(source):
            if size >= TEXT_LIMIT:
                logger.warning(CUT_WARNING, source)
                break
            document, nbytes = _encodable(document)
            size += nbytes
            advance(nbytes)
            if not _is_blank(document):
                documents.append(document)
    if not documents:
        raise InputError(f"{_shown(source)} holds no text, or only white space: give another source")
    return documents


def _encodable(document: Document) -> tuple[Document, int]:
    """The document and its number of bytes; an unpaired surrogate, which JSON allows, becomes a question mark."""
    if isinstance(document, str):
        data = document.encode("utf-8", errors="replace")
        return data.decode("utf-8"), len(data)
    if isinstance(document, Pair):
        source, target = (_encodable(part or "") for part in (document.source, document.target))
        return Pair(str(source[0]), None if document.target is None else str(target[0])), source[1] + target[1]
    messages = [tuple(_encodable(part) for part in message) for message in document.messages]
    return Chat(tuple((str(role), str(content)) for (role, _), (content, _) in messages)), sum(
        nbytes for message in messages for _, nbytes in message
    )


def _is_blank(document: Document) -> bool:
    if isinstance(document, Chat):
        texts = [content for _, content in document.messages]
    else:
        texts = [document.source if isinstance(document, Pair) else document]
    return not any(text.strip() for text in texts)


def fingerprint(documents: Iterable[Document]) -> str:
    """Return the SHA-256, in hexadecimal, of the documents, their order and their boundaries."""
    digest = hashlib.sha256()
    for document in documents:
        if isinstance(document, str):
            text = document
        else:
            text = json.dumps(document.messages if isinstance(document, Chat) else [document.source, document.target])
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))  # marks the boundary: ["ab"] is not ["a", "b"]
        digest.update(data)
    return digest.hexdigest()


def _documents_of(source: str) -> Iterator[Document]:
    try:
        path = Path(source).expanduser()
        exists = path.exists() and source != ""  # an empty path would be the current folder
    except (OSError, RuntimeError) as error:  # no permission, name too long, or unknown ~USER
        raise _unreadable(_shown(source), error) from error
    data_set = DATA_SET.fullmatch(source)
    if exists:
        if path.is_file() and not path.stat().st_size:
            raise InputError(f"{path} is empty: give a file that holds text")
        for file in _files_below(path) if path.is_dir() else [path]:
            yield from _reader_of(file)(file)
    elif data_set is None or data_set["name"].lower().endswith((*ENDINGS, *OTHER_FILE_ENDINGS)):
        raise InputError(f"{_no_file(path)}; give a file or a folder of files ({SUPPORTED}), or a data set's name")
    else:
        yield from _read_data_set(data_set)


def _reader_of(file: Path) -> Callable[[Path], Iterator[Document]]:
    readers: dict[str, Callable[[Path], Iterator[Document]]] = {
        ".txt": _read_plain,
        ".md": _read_plain,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
        ".json": _read_json,
        ".csv": _read_csv,
    }
    if file.suffix.lower() not in readers:
        raise InputError(f"{file} has an unknown ending: {SUPPORTED}; rename it if it is plain text")
    return readers[file.suffix.lower()]


def _files_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error) from error

    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [name for name in names if not name.startswith(".")]
        files += [Path(parent, name) for name in visible if name.lower().endswith(ENDINGS_IN_FOLDERS)]
    if not files:
        raise InputError(
            f"The folder {folder} has no readable text file: {SUPPORTED}; hidden files are skipped, and .json and .csv "
            "files must be given by name"
        )
    return sorted(files)


def _no_file(path: Path) -> str:
    """Return the message that a file is missing, with files of similar names."""
    sentence = f"There is no file or folder {_shown(str(path))}"
    try:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=3)
    except (OSError, ValueError):
        return f"{sentence} (nor a folder {_shown(str(path.parent))})"
    return f"{sentence} (did you mean {' or '.join(str(path.parent / name) for name in near)}?)" if near else sentence


def _unreadable(path: str | Path, error: OSError | RuntimeError) -> InputError:
    return InputError(f"{path} cannot be read ({getattr(error, 'strerror', '') or error}): check its permissions")


def _shown(source: str) -> str:
    return repr(source if len(source) <= 100 else source[:99] + "…")  # one line, whatever it holds


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file's bytes; UTF-16 text is converted to UTF-8."""
    try:
        with path.open("rb") as file:
            is_utf_16 = file.peek(2)[:2] in UTF_16_MARKS
            yield io.BytesIO(_decode(file.read(), path, encoding="UTF-16").encode()) if is_utf_16 else file
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_plain(path: Path) -> Iterator[str]:
    with _open(path) as file:
        raw = file.read(TEXT_LIMIT + 1)
    if is_cut := len(raw) > TEXT_LIMIT:
        logger.warning(CUT_WARNING, path)
    yield _decode(raw[:TEXT_LIMIT], path, is_cut=is_cut).removeprefix("\ufeff").replace("\r\n", "\n")


def _decode(raw: bytes, path: Path, offset: int = 0, is_cut: bool = False, encoding: str = "UTF-8") -> str:
    """Decode bytes from an offset of a file; if they are cut, the last character may be incomplete."""
    way_out = "save it as UTF-8 text, or give another file"
    if encoding == "UTF-8" and (nul := raw.find(b"\0")) >= 0:
        raise InputError(f"{path} is binary, not text (a NUL byte at byte offset {offset + nul}): {way_out}")
    try:
        return codecs.getincrementaldecoder(encoding)().decode(raw, final=not is_cut)
    except UnicodeDecodeError as error:
        place = f"byte {raw[error.start]:#04x} at byte offset {offset + error.start}"
        raise InputError(f"{path} is not {encoding} text ({place}): {way_out}") from error


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, with their line ends."""
    offset = 0
    with _open(path) as file:
        for raw in file:
            yield _decode(raw, path, offset).removeprefix("\ufeff")
            offset += len(raw)


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.isspace():
            parsed = _parsed(line, path, number, "fix or remove the line")
            yield _document_of(parsed, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Document]:
    entries = _parsed("".join(_lines(path)), path, 1, "fix it, or rename it to .jsonl if each line is a document")
    if not isinstance(entries, list):
        raise InputError(f'{path} is not a JSON list; write documents as [{{"text": "..."}}, ...]')
    for number, entry in enumerate(entries, start=1):
        yield entry if isinstance(entry, str) else _document_of(entry, f"{path}, entry {number}")


def _parsed(text: str, path: Path, first_line: int, way_out: str) -> object:
    """Parse JSON that begins at a line of a file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line - 1 + getattr(error, "lineno", 1)
        reason = getattr(error, "msg", "") or one_line(error)  # `msg` leaves out JSON's own lines
        raise InputError(f"{path}, line {line}: invalid JSON ({reason}); {way_out}") from error


def _read_csv(path: Path) -> Iterator[str]:
    csv.field_size_limit(TEXT_LIMIT)  # documents may exceed Python's default limit
    rows = csv.DictReader(_lines(path), strict=True)
    try:
        columns = rows.fieldnames or ()
        if "text" not in columns:
            found = ", ".join(map(_shown, columns[:20])) or "none"
            raise InputError(f"{path} has no column 'text' in its first line ({found}): name one column 'text'")
        for row in rows:
            if None in row:  # DictReader's key for surplus values
                raise InputError(
                    f"{path}, line {rows.line_num}: more values than columns; quote texts that contain a comma"
                )
            yield row["text"] or ""
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: invalid CSV ({error}); fix or remove the line") from error


def _document_of(record: object, where: str) -> Document:
    if not isinstance(record, Mapping):
        raise InputError(f'{where}: not a JSON object; write documents as {{"text": "..."}}')
    if _holds_messages(record):
        return _chat_of(record, where)
    return pair_of(record, where) if holds_pairs(record) else _text_of(record, where)


def _holds_messages(keys: Iterable[str]) -> bool:
    return MESSAGES in keys and "text" not in keys


def _chat_of(record: Mapping[str, object], where: str) -> Chat:
    """Return a record's conversation; null has no messages."""
    messages = record[MESSAGES]
    try:
        pairs = [(message["role"], message["content"]) for message in messages or ()]  # type: ignore[attr-defined]
    except (KeyError, TypeError):
        pairs = [(None, None)]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise InputError(f'{where}: {MESSAGES!r} must be a list of {{"role": "...", "content": "..."}}; fix it')
    return Chat(tuple(pairs))


def _text_of(record: Mapping[str, object], where: str) -> str:
    """Return a record's text; null is no text."""
    strings = [key for key, value in record.items() if value is None or isinstance(value, str)]
    key = _text_key(list(record), strings, where)
    value = record[key]
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {_shown(key)} holds no string but {type(value).__name__}; put the text there")
    return value or ""


def _text_key(keys: Sequence[str], string_keys: Sequence[str], where: str) -> str:
    """Return the key of the text: "text", or else the only one that holds strings."""
    if "text" in keys:
        return "text"
    if len(string_keys) == 1:
        return string_keys[0]
    found = ", ".join(map(_shown, keys[:20])) or "none"
    several = "several hold strings" if string_keys else "none holds strings"
    raise InputError(f"{where}: no 'text' among the keys found ({found}), and {several}; call the text's key 'text'")


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path} cannot be read without pyarrow: {INSTALL_HINT}") from error
    string_types = ("string", "large_string", "dictionary<values=string", "dictionary<values=large_string")
    with _open(path) as file:
        try:
            table = ParquetFile(file)
            names = table.schema_arrow.names
            strings = [field.name for field in table.schema_arrow if str(field.type).startswith(string_types)]
            if holds_pairs(names):
                for rows in table.iter_batches(batch_size=1024, columns=[name for name in names if name in PAIR_KEYS]):
                    yield from (pair_of(row, str(path)) for row in rows.to_pylist())
                return
            column = MESSAGES if _holds_messages(names) else _text_key(names, strings, str(path))
            key = MESSAGES if column == MESSAGES else "text"
            for rows in table.iter_batches(batch_size=1024, columns=[column]):
                values = rows.column(0).to_pylist()
                yield from (_document_of({key: value}, f"{path}, {column!r}") for value in values)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is a damaged parquet file ({one_line(error)}): copy it again") from error


def _read_data_set(source: re.Match[str]) -> Iterator[Document]:
    name, config, split = source["name"], source["config"] or None, source["split"] or "train"
    no_file = _no_file(Path(source[0]))
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub import errors as hub_errors
        from pyarrow import ArrowException
    except ImportError as error:
        raise InputError(f"{no_file}; to read a data set of that name: {INSTALL_HINT}") from error
    if name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}"):
        # `datasets` has file readers with such names ("text", "json"), which would read the current folder.
        raise InputError(f"{no_file}, and no data set can have that name; check the path")
    http_error: type[Exception] = getattr(hub_errors, "HTTPError", OSError)  # that of the Hub's HTTP client
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        for column in ("text", MESSAGES):
            if column in (rows.column_names or ()):
                rows = rows.select_columns([column])
                break
        for number, row in enumerate(rows, start=1):
            yield _document_of(row, f"Data set {source[0]}, row {number}")
    except InputError:  # a ValueError too
        raise
    # OSError: no network, HF_HUB_OFFLINE, no such data set. ValueError: no such config or split, an invalid name.
    # RuntimeError: a data set with a loading script. ImportError: a format that needs a package.
    except (DatasetsError, ArrowException, http_error, OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"{no_file}, and a data set of that name cannot be read ({one_line(error)}); check the name "
            "(NAME, NAME:CONFIG, NAME:CONFIG:SPLIT or NAME::SPLIT) and the network, or give a file"
        ) from error
