"""The example recipes."""

from pathlib import Path

import pytest

from hf_topk.convert import Recipe

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_example_recipe_is_read_and_differs_from_the_defaults(file: Path) -> None:
    assert Recipe.from_yaml(file) != Recipe()


def test_all_recipes_are_listed() -> None:
    listed = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert FILES
    assert [file.name for file in FILES if f"]({file.name})" not in listed] == []
