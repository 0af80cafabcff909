"""Figures that several pages repeat are those of the page that names their command."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SOURCES = ("fidelity.md", "speed.md", "frontier.md")


def figures_of(page: str) -> set[float]:
    """All decimals except those in names of models and versions."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return {float(figure) for figure in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\.\d)", text)}


@pytest.mark.parametrize("page", ["questions.md", "roadmap.md"])
def test_figures_are_those_of_their_sources(page: str) -> None:
    known = set().union(*map(figures_of, SOURCES))
    assert len(figures_of(page)) > 8
    assert figures_of(page) - known == set()
