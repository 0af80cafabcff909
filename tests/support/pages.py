"""Runs the Python code of a page as it is printed."""

from pathlib import Path
from typing import Any
from unittest import SkipTest

from sybil import Sybil
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[2]
PARSERS = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])
FENCE = "```python\n"


def page_of(name: str) -> Document:
    """Find the Python code of a page, by its path from the root."""
    return PARSERS.parse(ROOT / name)


def code_of(name: str) -> list[str]:
    """The blocks of Python of a page, those that do not run included."""
    return [str(example.parsed) for example in page_of(name).examples() if isinstance(example.parsed, str)]


def run_python_of(name: str, *, apart: bool = False, **names: Any) -> tuple[dict[str, Any], list[str]]:
    """Run the blocks of a page one after another in one namespace, as a reader would.

    Args:
        name: of the page, by its path from the root.
        apart: whether each block starts anew from the names.
        **names: what the page takes to be there.

    Returns:
        The namespace at the end, and why blocks were left out: `<!-- skip: next "why" -->` above them says so.
    """
    document, skipped = page_of(name), []
    document.namespace.update(names)
    for example in document.examples():
        if apart:
            document.namespace.clear()
            document.namespace.update(names)
        try:
            example.evaluate()
        except SkipTest as reason:
            skipped.append(str(reason))
    return document.namespace, skipped
