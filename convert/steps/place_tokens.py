"""Where each token goes: always on, or into an expert with those that are likely in the same contexts."""

import torch
from torch import Tensor

from hf_topk.model.head import TopKExpertsHead

from .distill import TokenStatistics
from .partition import partition


def place_tokens(
    head: TopKExpertsHead, specials: list[int], textless: list[int], statistics: TokenStatistics, seed: int
) -> None:
    """Decide which tokens are always on, the special and the likeliest ones, and which share an expert.

    An expert is a cluster of the mean hidden states in which a token is likely; see [`partition`]. Ids that no text has
    are kept apart: an expert's mass is learned, and most of it would be other tokens' in experts that have some.

    Args:
        head: its token ids are set in place.
        specials: ids of special tokens, the most important first: these are always on before any other.
        textless: ids that no text has.
        statistics: of the tokens over the sample.
        seed: of the clustering.
    """
    always_on = choose_always_on(statistics.probabilities, specials, head.num_always_on)
    head.always_on_ids.copy_(always_on)
    routed = torch.ones(head.out_features, dtype=torch.bool).index_fill_(0, always_on, False).nonzero().squeeze(-1)
    parts = apart(routed, torch.tensor(textless, dtype=torch.long), statistics.probabilities.cpu(), head.expert_size)
    contexts = [statistics.contexts[part.to(statistics.contexts.device)] for part in parts]
    experts = [partition(some, head.expert_size, seed) for some in contexts]
    head.expert_ids.copy_(torch.cat([part[places] for part, places in zip(parts, experts, strict=True)]))


def apart(routed: Tensor, textless: Tensor, probabilities: Tensor, expert_size: int) -> list[Tensor]:
    """Keep the ids that no text has apart from the others.

    Args:
        routed: ids to share out among experts.
        textless: ids that no text has.
        probabilities: mean probability of each token, [V].
        expert_size: S.

    Returns:
        The ids that no text has, with as many of the rarest others as fill their experts up, and the rest, each in
        ascending order; those of the two that have some.
    """
    is_textless = torch.isin(routed, textless)
    filled = -(-int(is_textless.sum()) // expert_size) * expert_size
    order = probabilities[routed].masked_fill(is_textless, -1).argsort(stable=True)
    return [part.sort().values for part in (routed[order[:filled]], routed[order[filled:]]) if len(part)]


def choose_always_on(probabilities: Tensor, specials: list[int], count: int) -> Tensor:
    """Ids to score at every position: special tokens, then the likeliest of the sample.

    Args:
        probabilities: mean probability of each token, [V].
        specials: ids of special tokens, the most important first; those beyond the vocabulary are left out.
        count: A.

    Returns:
        Ids in ascending order, int64 [A].
    """
    likeliest = probabilities.topk(min(len(probabilities), count + len(specials))).indices.tolist()
    ranked = dict.fromkeys([*(token for token in specials if 0 <= token < len(probabilities)), *likeliest])
    return torch.tensor(sorted(list(ranked)[:count]), dtype=torch.long)
