"""Pairs of source and target text, in records of calibration text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .model.errors import InputError

SOURCE, TARGET = PAIR_KEYS = ("source", "target")


@dataclass(frozen=True)
class Pair:
    """A source text and its target, such as a sentence and its translation.

    Attributes:
        source: input of the encoder.
        target: output of the decoder; None to let the model generate it.
    """

    source: str
    target: str | None = None

    def __len__(self) -> int:
        """Characters of source and target."""
        return len(self.source) + len(self.target or "")


def holds_pairs(keys: Iterable[str]) -> bool:
    """Whether records with these keys are pairs; texts and conversations take precedence.

    Args:
        keys: of a record.
    """
    return SOURCE in keys and "text" not in keys and "messages" not in keys


def pair_of(record: Mapping[str, object], where: str) -> Pair:
    """Return a record's pair; null counts as empty text.

    Args:
        record: a line or row.
        where: its place, for error messages.

    Raises:
        InputError: when its values are not strings.
    """
    source, target = record[SOURCE] or "", record.get(TARGET) or None
    if not isinstance(source, str) or not isinstance(target, str | None):
        raise InputError(f"{where}: {SOURCE!r} and {TARGET!r} must hold strings; put the texts there")
    return Pair(source, target)
