"""Pairs of what a model reads and what it is to write of it, in records that are read as sample text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .model.errors import InputError

SOURCE, TARGET = PAIR_KEYS = ("source", "target")


@dataclass(frozen=True)
class Pair:
    """What a model reads and what it is to write of it, such as a sentence and its translation.

    Attributes:
        source: what it reads.
        target: what it is to write; None leaves it to the model.
    """

    source: str
    target: str | None = None

    def __len__(self) -> int:
        """Characters of both."""
        return len(self.source) + len(self.target or "")


def holds_pairs(keys: Iterable[str]) -> bool:
    """Whether records with such keys are pairs; texts and conversations come first.

    Args:
        keys: of a record.
    """
    return SOURCE in keys and "text" not in keys and "messages" not in keys


def pair_of(record: Mapping[str, object], where: str) -> Pair:
    """Return a record's pair; null is no text.

    Args:
        record: a line or row.
        where: it stands, for messages.

    Raises:
        InputError: when it holds something else than strings.
    """
    source, target = record[SOURCE] or "", record.get(TARGET) or None
    if not isinstance(source, str) or not isinstance(target, str | None):
        raise InputError(f"{where}: {SOURCE!r} and {TARGET!r} must hold strings; put the texts there")
    return Pair(source, target)
