"""Assigns each token: always on, or to an expert with tokens that are likely in the same contexts."""

import torch
from torch import Tensor

from hf_topk.model.head import TopKExpertsHead

from .distill import TokenStatistics
from .partition import partition


def place_tokens(
    head: TopKExpertsHead, specials: list[int], unused: list[int], statistics: TokenStatistics, seed: int
) -> None:
    """Choose the always-on tokens, the special and the likeliest ones, and partition the others into experts.

    Tokens are clustered by their contexts: the mean hidden state in which a token is likely; see [`partition`].
    Unused ids get experts of their own: in a shared one, most of the learned mass would be that of other tokens.

    Args:
        head: its token ids are set in place.
        specials: ids of special tokens, the most important first; they become always on before any other.
        unused: unused ids.
        statistics: of the tokens over the calibration text.
        seed: of the clustering.
    """
    always_on = choose_always_on(statistics.probabilities, specials, head.num_always_on)
    head.always_on_ids.copy_(always_on)
    routed = torch.ones(head.out_features, dtype=torch.bool).index_fill_(0, always_on, False).nonzero().squeeze(-1)
    parts = separate_unused(
        routed, torch.tensor(unused, dtype=torch.long), statistics.probabilities.cpu(), head.expert_size
    )
    contexts = [statistics.contexts[part.to(statistics.contexts.device)] for part in parts]
    experts = [partition(some, head.expert_size, seed) for some in contexts]
    head.expert_ids.copy_(torch.cat([part[places] for part, places in zip(parts, experts, strict=True)]))


def separate_unused(routed: Tensor, unused: Tensor, probabilities: Tensor, expert_size: int) -> list[Tensor]:
    """Separate the unused ids from the others.

    Args:
        routed: ids to partition into experts.
        unused: unused ids.
        probabilities: mean probability of each token, [V].
        expert_size: S.

    Returns:
        The unused ids, with as many of the rarest others as complete their experts, and the remaining ids, each in
        ascending order; empty parts are left out.
    """
    is_unused = torch.isin(routed, unused)
    filled = -(-int(is_unused.sum()) // expert_size) * expert_size
    order = probabilities[routed].masked_fill(is_unused, -1).argsort(stable=True)
    return [part.sort().values for part in (routed[order[:filled]], routed[order[filled:]]) if len(part)]


def choose_always_on(probabilities: Tensor, specials: list[int], count: int) -> Tensor:
    """Choose the tokens to score at every position: special ones, then the likeliest of the calibration text.

    Args:
        probabilities: mean probability of each token, [V].
        specials: ids of special tokens, the most important first; ids outside the vocabulary are ignored.
        count: A.

    Returns:
        Ids in ascending order, int64 [A].
    """
    likeliest = probabilities.topk(min(len(probabilities), count + len(specials))).indices.tolist()
    ranked = dict.fromkeys([*(token for token in specials if 0 <= token < len(probabilities)), *likeliest])
    return torch.tensor(sorted(list(ranked)[:count]), dtype=torch.long)
