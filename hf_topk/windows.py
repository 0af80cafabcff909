"""Splits documents into windows: runs of tokens, each after the special tokens that begin a text."""

import random
import sys
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from operator import eq

from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from .documents import Chat, Document
from .model.errors import InputError, one_line
from .pairs import Pair
from .progress import progress_once_slow

WINDOW_LENGTH = 256  # tokens
POSITIONS_AT_ONCE = 4096  # per forward pass of the dense model
MIN_WINDOW_LENGTH = 2  # a single token predicts nothing
CHARACTERS_PER_PIECE = 2**16  # tokenizers need some 200 bytes of RAM per character, too much for a whole book
PIECES_PER_BATCH = 16  # tokenised in parallel
PROBE = "a"  # any text
KIND = "text"  # of a text, unless more is known
NO_TOKEN = -100  # the index that losses ignore


@dataclass(frozen=True)
class Window:
    """A run of token ids of one document, for one forward pass.

    Each token from `first` on is a position, at which the model predicts the next token.

    Attributes:
        document: index of the document.
        token_ids: the special tokens that begin a text, then tokens of the document; 2 to `window_length` in all.
        kind: of text, such as prose, or within a broader kind languages/de.
        first: index of the first position; earlier tokens are read only.
    """

    document: int
    token_ids: tuple[int, ...]
    kind: str = field(default=KIND, kw_only=True)
    first: int = field(default=0, kw_only=True)

    @property
    def broad_kind(self) -> str:
        """The kind without its subdivision."""
        return self.kind.partition("/")[0]

    @property
    def positions(self) -> int:
        """Number of positions."""
        return len(self.token_ids) - self.first

    @property
    def length(self) -> int:
        """Size in a forward pass, in positions."""
        return len(self.token_ids)

    @property
    def followers(self) -> tuple[int, ...]:
        """The next token of each position; `NO_TOKEN` for the last one."""
        return (*self.token_ids[self.first + 1 :], NO_TOKEN)


def make_windows(
    documents: Sequence[Document], tokenizer: Tokenizer, window_length: int, max_positions: int | None, seed: int
) -> list[Window]:
    """Tokenise documents and split them into windows: all, or a random selection that covers the documents evenly.

    Every window begins with the special tokens that the tokenizer puts before a text, even in the middle of a document,
    as models are trained with them; windows of a conversation begin as its chat template does. Tokens of the document
    fill it up to `window_length`. The last window of a document may be shorter, and is dropped if it has a single
    token. A selection takes a random window of each document, in random order of documents, then a second window of
    each, and so on; its last window is cut to fit `max_positions`.

    Args:
        documents: texts and conversations.
        tokenizer: the model's tokenizer.
        window_length: tokens in a window, at least 2, and more than the special tokens that begin a text.
        max_positions: the most tokens in all windows, at least 2; None for no limit.
        seed: of the random selection.

    Returns:
        The windows, in the order of the documents; at least one.

    Raises:
        InputError: a number is too small, no document has 2 tokens, or a conversation does not fit the tokenizer.
    """
    if not documents:
        raise InputError("There is no text to cut into windows: the list of documents is empty")
    opening = _opening_tokens(tokenizer)
    shortest = max(MIN_WINDOW_LENGTH, len(opening) + 1)
    for name, number in (("window_length", window_length), ("max_positions", max_positions)):
        if number is not None and number < shortest:
            raise InputError(f"{name} is {number}: it must be {shortest} or more")
    generator = random.Random(seed)
    order = generator.sample(range(len(documents)), len(documents))
    left = sys.maxsize if max_positions is None else max_positions
    drawn: list[tuple[int, int, tuple[int, ...]]] = []  # document, start, token ids
    with closing(_token_ids(documents, order, tokenizer, opening)) as token_ids:
        for document, start, window in _draw_round_robin(token_ids, window_length, generator):
            drawn.append((document, start, window[:left]))
            left -= min(left, len(window))
            if left < shortest:
                break
    if not drawn:
        raise InputError(f"The text is too short: no document has {MIN_WINDOW_LENGTH} tokens; give more text")
    return [Window(document, window) for document, _, window in sorted(drawn)]


def distinct_positions(windows: Sequence[Window]) -> list[Window]:
    """Leave out positions that repeat: in a causal model those with the same tokens before them have the same state.

    So the special tokens that begin a text, and what a chat template puts before each conversation, count once.

    Args:
        windows: of any documents.

    Returns:
        The windows, in order, without those that repeat another.
    """
    first: dict[int, int] = {}
    before: tuple[int, ...] = ()
    for index in sorted(range(len(windows)), key=lambda index: windows[index].token_ids):
        token_ids = windows[index].token_ids
        first[index] = sum(takewhile(bool, map(eq, before, token_ids)))
        before = token_ids
    made = [replace(window, first=first[index]) for index, window in enumerate(windows)]
    return [window for window in made if window.positions]


@dataclass(frozen=True)
class _Tokenised:
    """A document: its index, the special tokens that begin its windows, and its own tokens."""

    index: int
    opening: tuple[int, ...]
    own: "array[int]"

    def starts(self, window_length: int) -> range:
        """Where the windows start in the document's own tokens."""
        fewest = max(1, MIN_WINDOW_LENGTH - len(self.opening))
        return range(0, len(self.own) - fewest + 1, window_length - len(self.opening))

    def window(self, start: int, window_length: int) -> tuple[int, ...]:
        return (*self.opening, *self.own[start : start + window_length - len(self.opening)])


def _draw_round_robin(
    documents: Iterable[_Tokenised], window_length: int, generator: random.Random
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield document, start and token ids of a random window of each document, then of a second one of each, ..."""
    waiting: deque[tuple[_Tokenised, Iterator[int]]] = deque()
    for document in documents:
        all_starts = document.starts(window_length)
        if starts := generator.sample(all_starts, len(all_starts)):
            yield document.index, starts[0], document.window(starts[0], window_length)
            waiting.append((document, iter(starts[1:])))
    while waiting:
        document, rest = waiting.popleft()
        for start in islice(rest, 1):
            yield document.index, start, document.window(start, window_length)
            waiting.append((document, rest))


def _token_ids(
    documents: Sequence[Document], order: Sequence[int], tokenizer: Tokenizer, opening: tuple[int, ...]
) -> Generator[_Tokenised, None, None]:
    """Yield the tokenised documents in the given order, tokenising little more than is consumed."""
    ids = array("i")
    pieces = (piece for index in order for piece in _pieces(index, as_text(documents[index], tokenizer)))
    total = sum(len(document) for document in documents)
    with progress_once_slow("Tokenising", total, "characters") as advance:
        while batch := list(islice(pieces, PIECES_PER_BATCH)):
            # verbose=False: no warning that a text is too long for the model, as it is cut afterwards.
            encoded = tokenizer([text for _, text, _ in batch], add_special_tokens=False, verbose=False)
            for (index, text, is_last), piece_ids in zip(batch, encoded["input_ids"], strict=True):
                ids.extend(piece_ids)
                advance(len(text))
                if is_last:
                    yield _tokenised(index, documents[index], ids, opening)
                    ids = array("i")


def _tokenised(index: int, document: Document, ids: "array[int]", opening: tuple[int, ...]) -> _Tokenised:
    """Strip the special tokens that begin a text if it contains them; a conversation may have none."""
    if opening and tuple(ids[: len(opening)]) == opening:
        return _Tokenised(index, opening, ids[len(opening) :])
    return _Tokenised(index, () if isinstance(document, Chat) else opening, ids)


def as_text(document: Document, tokenizer: Tokenizer) -> str:
    """A document's text; a conversation's is made by the tokenizer's chat template, up to where the model answers.

    Args:
        document: a text or a conversation.
        tokenizer: the model's tokenizer.

    Raises:
        InputError: when there is no chat template, or it rejects the conversation.
    """
    if isinstance(document, str):
        return document
    if isinstance(document, Pair):
        raise InputError("the text has pairs of source and target, which only translation models read: give plain text")
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise InputError("the text has conversations, but the model's tokenizer has no chat template: give plain text")
    messages = [{"role": role, "content": content} for role, content in document.messages]
    is_unanswered = messages[-1]["role"] == "user"
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_unanswered))
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"the tokenizer's chat template rejects a conversation of the text ({one_line(error)}): "
            "change or remove the conversation"
        ) from error


def _opening_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text."""
    own: list[int] = tokenizer(PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    full: list[int] = tokenizer(PROBE, verbose=False)["input_ids"]
    places = range(len(full) - len(own) + 1)
    return tuple(full[: next((place for place in places if full[place : place + len(own)] == own), 0)])


def _pieces(index: int, document: str) -> Iterator[tuple[int, str, bool]]:
    """Yield a document's index, each piece of its text, and whether it is the last piece."""
    start = 0
    while len(document) - start > CHARACTERS_PER_PIECE:
        # Nearly all tokenizers start a new token at a space, so cutting there changes no token.
        space = document.rfind(" ", start + 1, start + CHARACTERS_PER_PIECE)
        end = space if space > 0 else start + CHARACTERS_PER_PIECE
        yield index, document[start:end], False
        start = end
    yield index, document[start:], True


def readable_length(config: PreTrainedConfig, wanted: int = WINDOW_LENGTH) -> int:
    """The window length, limited by the model's maximum number of positions.

    Args:
        config: of a dense or a converted model.
        wanted: tokens in a window.
    """
    of_text = config.get_text_config(decoder=True) if config.is_encoder_decoder else config.get_text_config()
    longest = getattr(of_text, "max_target_positions", None) or getattr(of_text, "max_position_embeddings", None)
    return min(wanted, longest) if isinstance(longest, int) and longest > 0 else wanted


def batches_of(windows: list[Window], positions: int = POSITIONS_AT_ONCE) -> Iterator[list[Window]]:
    """Group windows into batches of at most `positions` padded positions, but at least one window."""
    batch: list[Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, window.length)
        if batch and longest * (len(batch) + 1) > positions:
            yield batch
            batch, longest = [], window.length
        batch.append(window)
    if batch:
        yield batch
