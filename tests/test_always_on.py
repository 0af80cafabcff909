"""Which tokens are always on: special ones, likely ones, and those that routing misses."""

from typing import Any

import pytest
import torch
from helpers import VOCAB_SIZE, tiny_converted, tiny_dense
from torch import Tensor

from hf_topk.convert import Recipe, always_on
from hf_topk.convert.always_on import choose_always_on, missed_mass, place_tokens
from hf_topk.convert.distill import groups_of, token_probabilities
from hf_topk.head import TopKExpertsHead

SPECIALS = [7, 0, 1]


def some_states(count: int = 200) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(4))


def placed(num_always_on: int, specials: list[int] = SPECIALS, k: int = 2, **choices: Any) -> TopKExpertsHead:
    """A head of experts of 16, its tokens placed."""
    recipe = Recipe(expert_size=16, num_always_on=num_always_on, num_experts_per_tok=k, **choices).resolve(VOCAB_SIZE)
    sizes = {"num_experts": recipe.num_experts(VOCAB_SIZE), "num_always_on": num_always_on}
    head = tiny_converted(tiny_dense(), num_experts_per_tok=k, **sizes).head
    place_tokens(head, recipe, specials, some_states(), token_probabilities(some_states(), head.weight, None))
    return head


def test_special_tokens_come_before_likely_ones() -> None:
    probabilities = torch.linspace(0.1, 1, 10)
    assert choose_always_on(probabilities, [3, 1], 4).tolist() == [1, 3, 8, 9]
    assert choose_always_on(probabilities, [3, 1], 1).tolist() == [3]
    assert choose_always_on(probabilities, [12, 3], 2).tolist() == [3, 9]  # 12 is beyond the head
    assert choose_always_on(probabilities, [9], 3).tolist() == [7, 8, 9]
    assert choose_always_on(probabilities, [3], 0).tolist() == []


@pytest.mark.parametrize("partition", ["rows", "frequency", "context"])
@pytest.mark.parametrize("num_always_on", [0, 1, 3, 4, 8, 20])
def test_every_token_has_one_place(num_always_on: int, partition: str) -> None:
    head = placed(num_always_on, partition=partition)
    assert head.always_on_ids.shape == (num_always_on,)
    groups = [ids.tolist() for ids in groups_of(head)]
    assert sorted(token for ids in groups for token in ids) == list(range(VOCAB_SIZE))


@pytest.mark.parametrize("num_always_on", [1, 2, 3, 8, 20])
def test_special_tokens_stay_always_on_and_ends_of_text_come_first(num_always_on: int) -> None:
    assert set(SPECIALS[:num_always_on]) <= set(placed(num_always_on).always_on_ids.tolist())


def test_the_most_missed_tokens_take_the_places_of_the_less_likely_half(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(always_on, "SHARE_MISSED", 0.0)
        before = placed(8)
    missed = missed_mass(before, some_states(), 0)
    after = placed(8)
    came = set(after.always_on_ids.tolist()) - set(before.always_on_ids.tolist())
    went = set(before.always_on_ids.tolist()) - set(after.always_on_ids.tolist())
    assert came == set(missed.topk(4).indices.tolist())
    probabilities = token_probabilities(some_states(), before.weight, None)
    stayed = set(before.always_on_ids.tolist()) - went - set(SPECIALS)
    assert len(went) == 4
    assert all(probabilities[one] <= probabilities[other] for one in went for other in stayed)


@pytest.mark.parametrize("has_bias", [False, True])
def test_missed_mass_is_that_of_experts_not_picked(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(always_on, "train_router", lambda *arguments: 0.0)
    dense = tiny_dense("phi", tied=False, bias=True) if has_bias else tiny_dense()
    head = tiny_converted(dense, num_experts_per_tok=2).head
    head.weight.data.mul_(0.1)
    weight, bias = head.weight.detach(), torch.zeros(VOCAB_SIZE) if head.bias is None else head.bias.detach()
    states = some_states(30)
    probabilities = (states @ weight.t() + bias).softmax(dim=-1)
    groups = groups_of(head)[:-1]
    expected = torch.zeros(VOCAB_SIZE)
    for state, p in zip(states, probabilities, strict=True):
        scores = [float(weight[ids].mean(dim=0) @ state + bias[ids].logsumexp(dim=0)) for ids in groups]
        for expert in sorted(range(6), key=scores.__getitem__)[:-2]:
            expected[groups[expert]] += p[groups[expert]] ** 2
    torch.testing.assert_close(missed_mass(head, states, 0), expected)


def test_nothing_is_missed_when_all_experts_are_scored() -> None:
    head = placed(20, k=5)
    probabilities = token_probabilities(some_states(), head.weight, None)
    assert head.always_on_ids.tolist() == choose_always_on(probabilities, SPECIALS, 20).tolist()
