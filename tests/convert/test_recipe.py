"""The recipe: every choice of a conversion, its YAML, and refused values."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_topk.convert import Recipe
from hf_topk.model.configuration_topk_experts import CombineType
from hf_topk.model.errors import InputError

SIZES = st.integers(1, 10**6)
RECIPES = st.builds(
    Recipe,
    text=st.text(st.characters(codec="utf-8")),
    positions=SIZES,
    window_length=st.integers(2, 10**6),
    held_out=st.floats(0, 1, exclude_min=True, exclude_max=True),
    expert_size=SIZES,
    num_experts_per_tok=st.none() | SIZES,
    num_always_on=st.none() | st.integers(0, 10**6),
    target_agreement=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    router_rank=st.none() | SIZES,
    tail_rank=st.none() | SIZES,
    num_rescored=st.none() | SIZES,
    combine=st.sampled_from(get_args(CombineType)),
    sparse_max_positions=st.none() | st.integers(0, 10**6),
    distill_steps=SIZES,
    batch_size=SIZES,
    learning_rate=st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**63 - 1),
)


# To YAML and back


@given(RECIPES)
def test_yaml_gives_the_recipe_back(recipe: Recipe) -> None:
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@given(RECIPES)
def test_a_dictionary_gives_the_recipe_back(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_file_gives_the_recipe_back(tmp_path: Path) -> None:
    recipe = Recipe(text="ein Größeres: #1", expert_size=7, learning_rate=3e-4)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_yaml_keeps_the_documented_order() -> None:
    names = [line.partition(":")[0] for line in Recipe().to_yaml().splitlines()]
    assert names == [field.name for field in dataclasses.fields(Recipe)]


@pytest.mark.parametrize("content", ["", "# only a remark\n", "---\n"])
def test_an_empty_file_is_all_defaults(content: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == Recipe()


def test_choices_left_out_keep_their_defaults() -> None:
    recipe = Recipe.from_dict({"expert_size": 64})
    assert recipe == dataclasses.replace(Recipe(), expert_size=64)
    assert (recipe.text, recipe.combine, recipe.batch_size) == ("mixed", "exact", 256)


@pytest.mark.parametrize(("written", "value"), [("1e-3", 0.001), ("1", 1.0), ("0.5", 0.5)])
def test_a_recipe_file_writes_a_readable_learning_rate(written: str, value: float, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"learning_rate: {written}\n")  # YAML 1.1 reads 1e-3 as a string
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").learning_rate == value


# What depends on the dense model


# What is measured, and what it is measured against.
LEFT_OPEN = {
    "num_experts_per_tok",
    "num_rescored",
    "sparse_max_positions",
    "target_agreement",
    "max_bytes_read",
    "router_rank",
    "tail_rank",
}


def test_resolving_sets_all_choices_but_k_r_and_the_ranks() -> None:
    recipe = Recipe().resolve(32_768)
    assert {name for name, value in recipe.to_dict().items() if value is None} == LEFT_OPEN
    assert recipe.num_always_on == 64
    assert recipe.num_experts == 2044


@pytest.mark.parametrize("name", ["num_experts_per_tok", "num_rescored", "sparse_max_positions"])
def test_resolving_keeps_given_choices(name: str) -> None:
    assert Recipe(**{name: 3}).resolve(1000).to_dict() == {**Recipe().resolve(1000).to_dict(), name: 3}


@given(RECIPES, st.integers(2, 10**6))
def test_resolving_leaves_sizes_that_fit(recipe: Recipe, vocab_size: int) -> None:
    try:
        resolved = recipe.resolve(vocab_size)
    except InputError:
        always_on = recipe.num_always_on or 0
        experts = math.ceil((vocab_size - always_on) / recipe.expert_size)
        is_too_small = recipe.expert_size > vocab_size or always_on >= vocab_size
        # The default number of always-on tokens may take away the last expert.
        assert is_too_small or (recipe.num_experts_per_tok or 0) >= experts - (recipe.num_always_on is None)
        return
    experts = resolved.num_experts
    routed = vocab_size - resolved.num_always_on
    assert 1 <= (resolved.num_experts_per_tok or 1) <= experts
    assert resolved.num_experts_per_tok == recipe.num_experts_per_tok
    assert 0 <= resolved.num_always_on < vocab_size
    assert routed <= experts * resolved.expert_size < routed + resolved.expert_size
    assert resolved.resolve(vocab_size) == resolved


@given(st.integers(1, 300), st.integers(2, 1000), st.integers(0, 300))
def test_the_number_of_always_on_tokens_leaves_full_experts(expert_size: int, experts: int, more: int) -> None:
    vocab_size = expert_size * experts + more
    resolved = Recipe(expert_size=expert_size).resolve(vocab_size)
    routed = vocab_size - resolved.num_always_on
    assert routed % expert_size == 0
    assert resolved.num_always_on < min(64, vocab_size / 32) + expert_size


def test_windows_fit_the_model_s_positions() -> None:
    assert Recipe(window_length=256).resolve(1000, 128).window_length == 128
    assert Recipe(window_length=64).resolve(1000, 128).window_length == 64
    assert Recipe(window_length=256).resolve(1000).window_length == 256


@pytest.mark.parametrize(
    ("choices", "parts"),
    [
        ({"expert_size": 101}, ("expert_size is 101", "vocabulary of 100")),
        ({"expert_size": 10, "num_always_on": 100}, ("num_always_on is 100",)),
        ({"expert_size": 10, "num_always_on": 0, "num_experts_per_tok": 11}, ("only 10 experts",)),
    ],
)
def test_refuses_sizes_that_do_not_fit_the_vocabulary(choices: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        Recipe(**choices).resolve(100)
    for part in parts:
        assert part in str(caught.value)


# Wrong choices


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ({"experts_size": 16}, "expert_size"),
        ({"num_experts_per_token": 2}, "num_experts_per_tok"),
        ({"Router_rank": 8}, "router_rank"),
        ({"window-length": 16}, "window_length"),
        ({"router": "low_rank"}, "router_rank"),  # which earlier versions had
        ({"tail": "prior"}, "tail_rank"),
        ({"combine": "learnt"}, "learned"),
    ],
)
def test_suggests_near_matches(wrong: dict[str, Any], meant: str) -> None:
    with pytest.raises(InputError, match=f"unknown .*'.+': did you mean '{meant}'\\?"):
        Recipe.from_dict(wrong)


@pytest.mark.parametrize(("wrong", "known"), [({"zorglub": 1}, "held_out"), ({"combine": "zorglub"}, "learned")])
def test_lists_all_options_without_a_near_match(wrong: dict[str, Any], known: str) -> None:
    with pytest.raises(InputError, match=f"'zorglub': choose one of .*{known}"):
        Recipe.from_dict(wrong)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe)])
def test_refuses_a_value_of_a_wrong_type(name: str) -> None:
    with pytest.raises(InputError, match=name) as caught:
        Recipe.from_dict({name: ["a", "list"]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [True, 16.0, "16"])
def test_refuses_floats_and_bools_as_integers(value: object) -> None:
    with pytest.raises(InputError, match="expert_size"):
        Recipe.from_dict({"expert_size": value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("positions", "expert_size", "tail_rank", "distill_steps", "batch_size")),
        *((name, 0) for name in ("num_experts_per_tok", "num_rescored", "router_rank")),
        *((name, -1) for name in ("num_always_on", "sparse_max_positions", "seed")),
        ("seed", 2**63),
        ("window_length", 1),
        *(("held_out", value) for value in (0.0, 1.0, -0.5, math.nan, math.inf)),
        *(("learning_rate", value) for value in (0.0, -1e-3, math.nan, math.inf)),
    ],
)
def test_refuses_a_value_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"{name} is .*{value}.*must be"):
        Recipe.from_dict({name: value})


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"target_agreement": 99.5}, "target_agreement is 99.5, must be a share above 0 and below 1"),
        ({"target_agreement": 0}, "target_agreement is 0"),
        ({"target_agreement": 0.9, "max_bytes_read": 1.5}, "max_bytes_read is 1.5"),
        ({"max_bytes_read": 0.1}, "need a target_agreement"),
        ({"allow_below_target": True}, "need a target_agreement"),
    ],
)
def test_refuses_targets_out_of_range(choices: dict[str, float], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Recipe.from_dict(choices)
