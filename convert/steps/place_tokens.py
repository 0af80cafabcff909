"""Where each token goes: always on, or into an expert with those that are likely in the same contexts."""

import torch
from torch import Tensor

from hf_topk.model.head import TopKExpertsHead

from .distill import TokenStatistics
from .partition import partition


def place_tokens(head: TopKExpertsHead, specials: list[int], statistics: TokenStatistics, seed: int) -> None:
    """Decide which tokens are always on, the special and the likeliest ones, and which share an expert.

    An expert is a cluster of the mean hidden states in which a token is likely; see [`partition`].

    Args:
        head: its token ids are set in place.
        specials: ids of special tokens, the most important first: these are always on before any other.
        statistics: of the tokens over the sample.
        seed: of the clustering.
    """
    always_on = choose_always_on(statistics.probabilities, specials, head.num_always_on)
    head.always_on_ids.copy_(always_on)
    routed = torch.ones(head.out_features, dtype=torch.bool).index_fill_(0, always_on, False).nonzero().squeeze(-1)
    contexts = statistics.contexts[routed.to(statistics.contexts.device)]
    head.expert_ids.copy_(routed[partition(contexts, head.expert_size, seed)])


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
