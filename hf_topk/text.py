"""Sample text: documents read from files, folders and data sets, and the windows of tokens they are cut into."""

import codecs
import difflib
import hashlib
import importlib.util
import json
import logging
import os
import random
import re
import sys
import textwrap
import time
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from transformers import PreTrainedTokenizerBase as Tokenizer

from hf_topk.errors import InputError
from hf_topk.progress import Advance, progress

TEXT_LIMIT = 64 * 2**20  # bytes; far more than a conversion needs
MIN_WINDOW_LENGTH = 2  # a single token says nothing about the next
CHARACTERS_PER_PIECE = 2**16  # tokenizers take some 200 bytes of memory a character: never hand over a whole book
PIECES_PER_BATCH = 16  # tokenised in parallel
CUT_WARNING = f"Reading the first {TEXT_LIMIT >> 20} MiB of %s, not the rest"
SECONDS_BEFORE_PROGRESS = 2.0
INSTALL_HINT = "pip install 'hf-topk[datasets]'"
ENDINGS = (".txt", ".md", ".jsonl", ".parquet")
SUPPORTED = "supported are .txt, .md, .jsonl and .parquet"
OTHER_FILE_ENDINGS = (".json", ".csv", ".tsv", ".text", ".gz", ".zip", ".zst", ".html", ".xml", ".pdf", ".rst")
DATA_SET = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^:]*))?(:(?P<split>[^:]+))?", flags=re.ASCII)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """A run of token ids of one document that the model reads in one pass.

    Each token is a position: the model predicts the distribution of the token that follows it.

    Attributes:
        document: index of the document that the run comes from.
        token_ids: the run, 2 to `window_length` ids.
    """

    document: int
    token_ids: tuple[int, ...]


def read_documents(source: str) -> list[str]:
    """Read sample text, the first 64 MiB of it.

    A .txt or .md file is one document. Each line of a .jsonl file and each row of a .parquet file or data set is one:
    the text under "text", or else under the only key that holds strings. Blank documents are left out.

    Args:
        source: a .txt, .md, .jsonl or .parquet file; a folder of them, searched in depth and in sorted order, without
            hidden files; or a data set: "name", "name:config", "name:config:split" or "name::split". The split is
            "train" if none is named.

    Returns:
        The documents, in order; at least one.

    Raises:
        InputError: there is no such source, it cannot be read, or it holds no text.
    """
    documents: list[str] = []
    size = 0
    with _progress_once_slow(f"Reading {_shown(source)}", TEXT_LIMIT, "bytes") as advance:
        for document in _documents_of(source):
            if size >= TEXT_LIMIT:
                logger.warning(CUT_WARNING, source)
                break
            # JSON can spell half a surrogate pair, which no tokenizer takes: it becomes a question mark.
            data = document.encode("utf-8", errors="replace")
            size += len(data)
            advance(len(data))
            if document and not document.isspace():
                documents.append(data.decode("utf-8"))
    if not documents:
        raise InputError(f"{_shown(source)} holds no text, or only white space: give a source that holds some")
    return documents


def fingerprint(documents: Iterable[str]) -> str:
    """Return the SHA-256, in hexadecimal, of documents, their order and where each of them ends."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))  # marks the boundary: ["ab"] is not ["a", "b"]
        digest.update(data)
    return digest.hexdigest()


def make_windows(
    documents: Sequence[str], tokenizer: Tokenizer, window_length: int, max_positions: int | None, seed: int
) -> list[Window]:
    """Tokenise documents and cut them into windows: all there are, or a sample that covers the documents evenly.

    Every document starts with the special tokens that the tokenizer puts there. It is cut into runs of
    `window_length` tokens; the last run is shorter, and left out if it is a single token. A sample takes a random
    window of each document, the documents in random order, then a second one of each, and so on; the window that
    reaches `max_positions` is cut to fit.

    Args:
        documents: the texts.
        tokenizer: the model's tokenizer.
        window_length: tokens in a window, at least 2.
        max_positions: the most tokens in all windows together, at least 2; None takes everything.
        seed: seed of the sample; the same seed draws the same windows.

    Returns:
        The windows, in the order in which they stand in the documents; at least one.

    Raises:
        InputError: a number is too small, or no document has 2 tokens.
    """
    for name, number in (("window_length", window_length), ("max_positions", max_positions)):
        if number is not None and number < MIN_WINDOW_LENGTH:
            raise InputError(f"{name} is {number}: it must be {MIN_WINDOW_LENGTH} or more")
    if not documents:
        raise InputError("There is no text to cut into windows: the list of documents is empty")
    generator = random.Random(seed)
    order = generator.sample(range(len(documents)), len(documents))
    left = sys.maxsize if max_positions is None else max_positions
    drawn: list[tuple[int, int, tuple[int, ...]]] = []  # document, start, token ids
    with closing(_token_ids(documents, order, tokenizer)) as token_ids:
        for document, start, window in _draw_round_robin(token_ids, window_length, generator):
            drawn.append((document, start, window[:left]))
            left -= min(left, len(window))
            if left < MIN_WINDOW_LENGTH:
                break
    if not drawn:
        raise InputError(f"The text is too short: no document has {MIN_WINDOW_LENGTH} tokens; give more text")
    return [Window(document, window) for document, _, window in sorted(drawn)]


def _draw_round_robin(
    token_ids: Iterable[tuple[int, "array[int]"]], window_length: int, generator: random.Random
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield document, start and token ids of a random window of each document, then of a second one of each..."""
    waiting: deque[tuple[int, array[int], Iterator[int]]] = deque()
    for document, ids in token_ids:
        all_starts = range(0, len(ids) - MIN_WINDOW_LENGTH + 1, window_length)
        if starts := generator.sample(all_starts, len(all_starts)):
            yield document, starts[0], tuple(ids[starts[0] : starts[0] + window_length])
            waiting.append((document, ids, iter(starts[1:])))
    while waiting:
        document, ids, rest = waiting.popleft()
        for start in islice(rest, 1):
            yield document, start, tuple(ids[start : start + window_length])
            waiting.append((document, ids, rest))


def _token_ids(
    documents: Sequence[str], order: Sequence[int], tokenizer: Tokenizer
) -> Generator[tuple[int, "array[int]"], None, None]:
    """Yield the documents' indices and token ids in the given order, tokenising little more than is asked for."""
    opening = _opening_tokens(documents, tokenizer)
    ids = array("i", opening)
    pieces = (piece for index in order for piece in _pieces(index, documents[index]))
    with _progress_once_slow("Tokenising", sum(map(len, documents)), "characters") as advance:
        while batch := list(islice(pieces, PIECES_PER_BATCH)):
            # verbose=False: no warning that a text is longer than the model reads, for it is cut afterwards.
            encoded = tokenizer([text for _, text, _ in batch], add_special_tokens=False, verbose=False)
            for (index, text, is_last), piece_ids in zip(batch, encoded["input_ids"], strict=True):
                ids.extend(piece_ids)
                advance(len(text))
                if is_last:
                    yield index, ids
                    ids = array("i", opening)


def _opening_tokens(documents: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text: what stands before the text's own tokens."""
    for text in (document[:100] for document in documents):
        if own := tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
            full: list[int] = tokenizer(text, verbose=False)["input_ids"]
            places = range(len(full) - len(own) + 1)
            return full[: next((place for place in places if full[place : place + len(own)] == own), 0)]
    return []


def _pieces(index: int, document: str) -> Iterator[tuple[int, str, bool]]:
    """Yield a document's index with its text in pieces, and whether a piece is the document's last."""
    start = 0
    while len(document) - start > CHARACTERS_PER_PIECE:
        # Nearly all tokenizers start a token at a space, so that a cut before one changes no token.
        space = document.rfind(" ", start + 1, start + CHARACTERS_PER_PIECE)
        end = space if space > 0 else start + CHARACTERS_PER_PIECE
        yield index, document[start:end], False
        start = end
    yield index, document[start:], True


@contextmanager
def _progress_once_slow(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Show progress as `progress` does, but only of a step that takes longer than `SECONDS_BEFORE_PROGRESS`."""
    started = time.monotonic()
    done = 0
    shown: Advance | None = None
    with ExitStack() as stack:

        def advance(amount: int = 1) -> None:
            nonlocal done, shown
            done += amount
            if shown is not None:
                shown(amount)
            elif time.monotonic() - started > SECONDS_BEFORE_PROGRESS:
                shown = stack.enter_context(progress(description, total, unit))
                shown(done)

        yield advance


def _documents_of(source: str) -> Iterator[str]:
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


def _reader_of(file: Path) -> Callable[[Path], Iterator[str]]:
    readers = {".txt": _read_plain, ".md": _read_plain, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
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


def _read_jsonl(path: Path) -> Iterator[str]:
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
            yield _text_of(record, f"{path}, line {number}")


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


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path} cannot be read without pyarrow: {INSTALL_HINT}") from error
    string_types = ("string", "large_string", "dictionary<values=string", "dictionary<values=large_string")
    with _open(path) as file:
        try:
            table = ParquetFile(file)
            strings = [field.name for field in table.schema_arrow if str(field.type).startswith(string_types)]
            column = _text_key(table.schema_arrow.names, strings, str(path))
            for rows in table.iter_batches(batch_size=1024, columns=[column]):
                yield from (_text_of({"text": value}, f"{path}, {column!r}") for value in rows.column(0).to_pylist())
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is a damaged parquet file ({_one_line(error)}): copy it again") from error


def _read_data_set(source: re.Match[str]) -> Iterator[str]:
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
        if "text" in (rows.column_names or ()):
            rows = rows.select_columns(["text"])
        for number, row in enumerate(rows, start=1):
            yield _text_of(row, f"Data set {source[0]}, row {number}")
    except InputError:  # a ValueError too
        raise
    # OSError: no network, HF_HUB_OFFLINE, no such data set. ValueError: no such config or split, a name that the Hub
    # does not allow. RuntimeError: a data set that needs code to be run. ImportError: a format that needs a package.
    except (DatasetsError, ArrowException, http_error, OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"{no_file}, and a data set of that name cannot be read ({_one_line(error)}); check the name "
            "(NAME, NAME:CONFIG, NAME:CONFIG:SPLIT or NAME::SPLIT) and the network, or give a file"
        ) from error
