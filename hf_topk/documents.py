"""Sample text: documents read from files, folders and data sets."""

import codecs
import difflib
import hashlib
import importlib.util
import json
import logging
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .model.errors import InputError
from .progress import progress_once_slow

TEXT_LIMIT = 64 * 2**20  # bytes; far more than a conversion needs
CUT_WARNING = f"Reading the first {TEXT_LIMIT >> 20} MiB of %s, not the rest"
INSTALL_HINT = "pip install 'hf-topk[datasets]'"
ENDINGS = (".txt", ".md", ".jsonl", ".parquet")
MESSAGES = "messages"  # the key of conversations
SUPPORTED = "supported are .txt, .md, .jsonl and .parquet"
OTHER_FILE_ENDINGS = (".json", ".csv", ".tsv", ".text", ".gz", ".zip", ".zst", ".html", ".xml", ".pdf", ".rst")
DATA_SET = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?", flags=re.ASCII)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """A conversation, which becomes text by a tokenizer's chat template.

    Attributes:
        messages: pairs of a role and what it says.
    """

    messages: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        """Characters of all messages."""
        return sum(len(content) for _, content in self.messages)


Document = str | Chat


def read_documents(source: str) -> list[Document]:
    """Read sample text, the first 64 MiB of it.

    A .txt or .md file is one document. Each line of a .jsonl file and each row of a .parquet file or data set is one:
    the text under "text", or else the conversation under "messages" (a list of {"role": ..., "content": ...}), or else
    the text under the only key that holds strings. Blank documents are left out.

    Args:
        source: a .txt, .md, .jsonl or .parquet file; a folder of them, searched in depth and in sorted order, without
            hidden files; or a data set: "name", "name:config", "name:config:split" or "name::split". The split is
            "train" if none is named.

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
        raise InputError(f"{_shown(source)} holds no text, or only white space: give a source that holds some")
    return documents


def _encodable(document: Document) -> tuple[Document, int]:
    """The document, and its bytes; half a surrogate pair, which JSON can spell, becomes a question mark."""
    if isinstance(document, str):
        data = document.encode("utf-8", errors="replace")
        return data.decode("utf-8"), len(data)
    messages = [tuple(_encodable(part) for part in message) for message in document.messages]
    return Chat(tuple((str(role), str(content)) for (role, _), (content, _) in messages)), sum(
        nbytes for message in messages for _, nbytes in message
    )


def _is_blank(document: Document) -> bool:
    texts = [document] if isinstance(document, str) else [content for _, content in document.messages]
    return not any(text.strip() for text in texts)


def fingerprint(documents: Iterable[Document]) -> str:
    """Return the SHA-256, in hexadecimal, of documents, their order and where each of them ends."""
    digest = hashlib.sha256()
    for document in documents:
        text = document if isinstance(document, str) else json.dumps(document.messages)
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))  # marks the boundary: ["ab"] is not ["a", "b"]
        digest.update(data)
    return digest.hexdigest()


def _documents_of(source: str) -> Iterator[Document]:
    try:
        path = Path(source).expanduser()
        exists = path.exists() and source != ""  # which would be the current folder
    except (OSError, RuntimeError) as error:  # its folder is closed to us, the name too long or ~WHO unknown
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
        files += [Path(parent, name) for name in names if not name.startswith(".") and name.lower().endswith(ENDINGS)]
    if not files:
        raise InputError(f"The folder {folder} has no readable text file: {SUPPORTED}; hidden files are skipped")
    return sorted(files)


def _no_file(path: Path) -> str:
    """Return the sentence that a file is missing, with files whose names are like its."""
    sentence = f"There is no file or folder {_shown(str(path))}"
    try:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=3)
    except (OSError, ValueError):
        return f"{sentence} (nor a folder {_shown(str(path.parent))})"
    return f"{sentence} (did you mean {' or '.join(str(path.parent / name) for name in near)}?)" if near else sentence


def _unreadable(path: str | Path, error: OSError | RuntimeError) -> InputError:
    return InputError(f"{path} cannot be read ({getattr(error, 'strerror', '') or error}): check its permissions")


def _shown(source: str) -> str:
    return repr(source if len(source) <= 100 else source[:99] + "…")  # in one line, whatever it holds


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), width=300, placeholder=" …") or type(error).__name__


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_plain(path: Path) -> Iterator[str]:
    with _open(path) as file:
        raw = file.read(TEXT_LIMIT + 1)
    if is_cut := len(raw) > TEXT_LIMIT:
        logger.warning(CUT_WARNING, path)
    yield _decode(raw[:TEXT_LIMIT], path, is_cut=is_cut).removeprefix("\ufeff").replace("\r\n", "\n")


def _decode(raw: bytes, path: Path, offset: int = 0, is_cut: bool = False) -> str:
    """Decode bytes that stand at an offset of a file; where they are cut, the last character may be incomplete."""
    way_out = "save it as UTF-8 text, or give another file"
    if (nul := raw.find(b"\0")) >= 0:
        raise InputError(f"{path} is binary, not text (a NUL byte at byte offset {offset + nul}): {way_out}")
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw, final=not is_cut)
    except UnicodeDecodeError as error:
        place = f"byte {raw[error.start]:#04x} at byte offset {offset + error.start}"
        raise InputError(f"{path} is not UTF-8 text ({place}): {way_out}") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    offset = 0
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, path, offset).removeprefix("\ufeff")
            offset += len(raw)
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", "") or _one_line(error)  # `msg` leaves out JSON's own "line 1"
                raise InputError(f"{path}, line {number}: broken JSON ({reason}); mend or remove the line") from error
            if not isinstance(record, dict):
                raise InputError(f'{path}, line {number}: no JSON object; write documents as {{"text": "..."}}')
            yield _document_of(record, f"{path}, line {number}")


def _document_of(record: Mapping[str, object], where: str) -> Document:
    return _chat_of(record, where) if _holds_messages(record) else _text_of(record, where)


def _holds_messages(keys: Iterable[str]) -> bool:
    return MESSAGES in keys and "text" not in keys


def _chat_of(record: Mapping[str, object], where: str) -> Chat:
    """Return a record's conversation; null is one of no messages."""
    messages = record[MESSAGES]
    try:
        pairs = [(message["role"], message["content"]) for message in messages or ()]  # type: ignore[attr-defined]
    except (KeyError, TypeError):
        pairs = [(None, None)]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise InputError(f'{where}: {MESSAGES!r} must be a list of {{"role": "...", "content": "..."}}; mend it')
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
            column = MESSAGES if _holds_messages(names) else _text_key(names, strings, str(path))
            key = MESSAGES if column == MESSAGES else "text"
            for rows in table.iter_batches(batch_size=1024, columns=[column]):
                values = rows.column(0).to_pylist()
                yield from (_document_of({key: value}, f"{path}, {column!r}") for value in values)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is a damaged parquet file ({_one_line(error)}): copy it again") from error


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
        # `datasets` has file readers of such names ("text", "json"), which would read the current folder.
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
    # OSError: no network, HF_HUB_OFFLINE, no such data set. ValueError: no such config or split, a name that the Hub
    # does not allow. RuntimeError: a data set that needs code to be run. ImportError: a format that needs a package.
    except (DatasetsError, ArrowException, http_error, OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"{no_file}, and a data set of that name cannot be read ({_one_line(error)}); check the name "
            "(NAME, NAME:CONFIG, NAME:CONFIG:SPLIT or NAME::SPLIT) and the network, or give a file"
        ) from error
