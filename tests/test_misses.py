"""What routing misses becomes always-on, and every token keeps exactly one place."""

import pytest
import torch
from helpers import VOCAB_SIZE, tiny_converted
from torch import Tensor

from hf_topk import TopKExpertsHead
from hf_topk.convert import Recipe, misses
from hf_topk.convert.distill import expert_masses, groups_of, token_statistics
from hf_topk.convert.features import place_tokens


def states_of(head: TopKExpertsHead) -> Tensor:
    """States whose dense argmax is this and that token."""
    torch.manual_seed(1)
    return torch.randn(500, head.in_features) + 3 * head.weight[torch.arange(500) % VOCAB_SIZE]


def placed(
    num_always_on: int, expert_size: int = 16, specials: tuple[int, ...] = (7,)
) -> tuple[TopKExpertsHead, Tensor]:
    recipe = Recipe(expert_size=expert_size, num_always_on=num_always_on).resolve(VOCAB_SIZE)
    num_experts = recipe.num_experts(VOCAB_SIZE)
    head = tiny_converted(num_experts=num_experts, expert_size=expert_size, num_always_on=num_always_on).head
    head.requires_grad_(False)
    states = states_of(head)
    return head, place_tokens(head, recipe, list(specials), token_statistics(states, head.weight, None))


def swap_in_missed(head: TopKExpertsHead, states: Tensor, reserved: Tensor) -> list[int]:
    best = expert_masses(states, head.weight, None, groups_of(head)).best
    probabilities = token_statistics(states, head.weight, None).probabilities
    return misses.swap_in_missed(head, states, best, probabilities, reserved)


def missed_positions(head: TopKExpertsHead, states: Tensor) -> int:
    home = {token: expert for expert, ids in enumerate(head.expert_ids.tolist()) for token in ids}
    scored = head.router(states).topk(misses.EXPERTS_SCORED).indices.tolist()
    best = (states @ head.weight.t()).argmax(-1).tolist()
    return sum(token in home and home[token] not in picked for token, picked in zip(best, scored, strict=True))


@pytest.mark.parametrize("num_always_on", [0, 1, 4, 12, 20])
@pytest.mark.parametrize("expert_size", [8, 16])
def test_every_token_has_one_place_and_special_ones_stay(num_always_on: int, expert_size: int) -> None:
    head, reserved = placed(num_always_on, expert_size)
    before, short = head.expert_ids.clone(), head.expert_ids[-1].clone()
    states = states_of(head)
    changed = swap_in_missed(head, states, reserved)
    assert changed == [one for one in range(head.num_experts) if not head.expert_ids[one].equal(before[one])]
    assert sorted(torch.cat(groups_of(head)).tolist()) == list(range(VOCAB_SIZE))
    assert (head.always_on_ids.diff() > 0).all()
    if num_always_on:
        assert 7 in head.always_on_ids
        assert len(reserved) == num_always_on // 2
    if len(short.unique()) < expert_size:
        assert head.expert_ids[-1].equal(short)
    # No more tokens change places than places were kept.
    assert sum(len(set(a) - set(b)) for a, b in zip(before.tolist(), head.expert_ids.tolist(), strict=True)) <= len(
        reserved
    )


def test_fewer_positions_are_missed() -> None:
    head, reserved = placed(24)
    states = states_of(head)
    before = missed_positions(head, states)
    swap_in_missed(head, states, reserved)
    after = missed_positions(head, states)
    assert after < 0.95 * before


def test_the_most_missed_tokens_are_those_that_are_chosen() -> None:
    head, reserved = placed(6)
    routed = int(head.expert_ids[0, 1])
    head.weight[routed] *= 5  # so that it is the argmax where its row is the state
    states = torch.cat([states_of(head)[:10], head.weight[routed].expand(200, -1)])
    head.router.bias[0] = -1e6  # its expert is never scored
    swap_in_missed(head, states, reserved)
    assert routed in head.always_on_ids


def test_special_tokens_are_never_given_up() -> None:
    specials = tuple(range(40, 50))
    head, reserved = placed(12, specials=specials)
    assert len(reserved) == 2
    states = states_of(head)
    swap_in_missed(head, states, reserved)
    assert set(specials) <= set(head.always_on_ids.tolist())
