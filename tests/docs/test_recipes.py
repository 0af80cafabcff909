"""The example recipes."""

import dataclasses
import re
from pathlib import Path

import pytest

from hf_topk import TopKExpertsConfig
from hf_topk.convert import Recipe
from hf_topk.convert.steps.choose_ranks import default_ranks

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_example_recipe_is_read_and_differs_from_the_defaults(file: Path) -> None:
    assert Recipe.from_yaml(file) != Recipe()


def test_all_recipes_are_listed() -> None:
    listed = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert FILES
    assert [file.name for file in FILES if f"]({file.name})" not in listed] == []


def test_the_table_of_choices_has_every_choice_and_its_default() -> None:
    page = (RECIPES.parent / "operating-point.md").read_text(encoding="utf-8")
    defaults, listed, compared = dataclasses.asdict(Recipe()), set(), 0
    for cells in re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \|.*?\| ([^|]*) \| [^|]* \|$", page.split("## The choices")[1], re.MULTILINE
    ):
        names, shown = re.findall(r"\w+", cells[0]), cells[1].replace("`", "").split(", ")
        listed |= set(names)
        for name, value in zip(names, shown, strict=False):
            if defaults[name] is not None:
                assert value == str(defaults[name])
                compared += 1
    assert listed == set(defaults)
    assert compared > 9


def test_a_configuration_has_the_defaults_of_a_recipe() -> None:
    recipe, config = dataclasses.asdict(Recipe()), TopKExpertsConfig()
    shared = [name for name, value in recipe.items() if value is not None and hasattr(config, name)]
    assert {name: getattr(config, name) for name in shared} == {name: recipe[name] for name in shared}
    assert {"expert_size", "combine"} <= set(shared)
    assert default_ranks(Recipe()) == (config.router_rank, config.tail_rank)
