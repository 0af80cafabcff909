"""Always-on tokens: the special ones, the likeliest of the sample, and those that routing missed most on it."""

import math

import torch
from torch import Tensor

from hf_topk.head import TopKExpertsHead
from hf_topk.progress import progress
from hf_topk.routers import LowRankRouter

from .distill import (
    STATES_AT_ONCE,
    blocks_of_groups,
    evenly_spaced,
    expert_masses,
    groups_of,
    start_router,
    train_router,
)
from .features import share_out
from .recipe import ROUTER_RANKS, Recipe

SHARE_MISSED = 0.5  # of the always-on tokens: what is given to the most missed
STATES_LOOKED_AT = 8192
STEPS, BATCH_SIZE, LEARNING_RATE = 300, 512, 5e-3  # of the router that shows what is hard to route
POWER = 2  # of the probability that a missed token had: between its mass, 1, and its argmax, infinity


def place_tokens(
    head: TopKExpertsHead, recipe: Recipe, specials: list[int], states: Tensor, probabilities: Tensor
) -> None:
    """Decide where every token goes: which are always on, and which share an expert.

    At first the likeliest tokens are always on. A small router is distilled on the experts of the others, the tokens
    that it misses most take the places of the less likely half of them, and the rest is shared out again.

    Args:
        head: its token ids are set in place.
        recipe: resolved; names the partition, k, S and the seed.
        specials: ids of special tokens, the most important first: these are always on.
        states: hidden states of the sample, [N, d].
        probabilities: mean probability of each token over the sample, [V].
    """
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    always_on = choose_always_on(probabilities, specials, head.num_always_on)
    _place(head, always_on, share_out(recipe, always_on, states, weight, bias, probabilities))
    likely = choose_always_on(probabilities, specials, math.ceil((1 - SHARE_MISSED) * head.num_always_on))
    if len(likely) == head.num_always_on or head.num_experts_per_tok == head.num_experts:
        return
    missed = missed_mass(head, states, recipe.seed)
    # Behind what is missed come the likeliest, if too few tokens are missed at all.
    ranked = torch.where(missed > 0, missed, probabilities.to(missed) - 1)
    always_on = choose_always_on(ranked, [*specials, *likely.tolist()], head.num_always_on)
    _place(head, always_on, share_out(recipe, always_on, states, weight, bias, probabilities))


def _place(head: TopKExpertsHead, always_on: Tensor, expert_ids: Tensor) -> None:
    head.always_on_ids.copy_(always_on)
    head.expert_ids.copy_(expert_ids)


def choose_always_on(probabilities: Tensor, specials: list[int], count: int) -> Tensor:
    """Ids to score at every position: special tokens, then those that rank first.

    Args:
        probabilities: mean probability of each token, or another figure to rank by, [V].
        specials: ids of special tokens, the most important first; those beyond the vocabulary are left out.
        count: A.

    Returns:
        Ids in ascending order, int64 [A].
    """
    likeliest = probabilities.topk(min(len(probabilities), count + len(specials))).indices.tolist()
    ranked = dict.fromkeys([*(token for token in specials if token < len(probabilities)), *likeliest])
    return torch.tensor(sorted(list(ranked)[:count]), dtype=torch.long)


@torch.no_grad()
def missed_mass(head: TopKExpertsHead, states: Tensor, seed: int) -> Tensor:
    """How much of each token a quickly distilled router misses at the head's k.

    Args:
        head: its token ids are set; its router is not touched.
        states: hidden states of the sample, [N, d].
        seed: of the router.

    Returns:
        For each token the sum of its squared dense probability over the positions at which its expert is not picked,
        fp32 [V]; 0 for always-on tokens.
    """
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    sample, groups = evenly_spaced(states, STATES_LOOKED_AT).to(weight.device), groups_of(head)
    masses = expert_masses(sample, weight, bias, groups).to(weight.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = LowRankRouter(head.in_features, head.num_experts, ROUTER_RANKS["low_rank"]).to(weight.device)
    start_router(head, router)
    train_router(router, sample, masses, STEPS, BATCH_SIZE, LEARNING_RATE, seed)
    scores = torch.cat([router(some) for some in sample.split(STATES_AT_ONCE)])
    is_missed = torch.ones_like(scores).scatter_(1, scores.topk(head.num_experts_per_tok, dim=-1).indices, 0.0)
    return _missed_mass(weight, bias, sample, masses.logsumexp(dim=-1), is_missed, groups[: head.num_experts])


def _missed_mass(
    weight: Tensor, bias: Tensor | None, states: Tensor, total: Tensor, is_missed: Tensor, groups: list[Tensor]
) -> Tensor:
    missed = torch.zeros(weight.shape[0], device=weight.device)
    with progress("Looking for missed tokens", len(groups), "experts") as advance:
        for first, block in blocks_of_groups(groups):
            ids = torch.cat(block)
            rows, row_bias = weight[ids].float(), 0.0 if bias is None else bias[ids].float()
            sizes = torch.tensor([len(group) for group in block], device=weight.device)
            which = first + torch.arange(len(block), device=weight.device).repeat_interleave(sizes)
            for start in range(0, len(states), STATES_AT_ONCE):
                some = slice(start, start + STATES_AT_ONCE)
                log_probabilities = states[some].float() @ rows.t() + row_bias - total[some].unsqueeze(-1)
                missed[ids] += (log_probabilities.mul_(POWER).exp_() * is_missed[some][:, which]).sum(dim=0)
            advance(len(block))
    return missed
