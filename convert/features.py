"""Where each token goes: always on, or into an expert by its row of the head, its frequency or its contexts."""

import torch
from torch import Tensor

from hf_topk.head import TopKExpertsHead

from .distill import TokenStatistics
from .partition import partition
from .recipe import Recipe


def place_tokens(head: TopKExpertsHead, recipe: Recipe, specials: list[int], statistics: TokenStatistics) -> Tensor:
    """Decide which tokens are always on and which share an expert.

    Half of the always-on tokens are the special and the likeliest ones. The places of the others are kept, by tokens
    that hardly ever matter, for what routing turns out to miss; see [`misses.swap_in_missed`].

    Args:
        head: its token ids are set in place.
        recipe: resolved.
        specials: ids of special tokens, the most important first: these are always on before any other.
        statistics: of the tokens over the sample.

    Returns:
        The ids that keep a place, int64 [A / 2], fewer where there are many special tokens.
    """
    num_always_on, probabilities = head.num_always_on, statistics.probabilities
    num_likely = min(num_always_on, max(num_always_on - num_always_on // 2, len(specials)))
    likely = choose_always_on(probabilities, specials, num_likely)
    others = probabilities.index_fill(0, likely.to(probabilities.device), torch.inf)
    reserved = others.topk(num_always_on - num_likely, largest=False).indices.cpu()
    always_on = torch.cat([likely, reserved]).sort().values
    head.always_on_ids.copy_(always_on)
    head.expert_ids.copy_(share_out(recipe, always_on, head.weight.detach(), statistics))
    return reserved


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


def share_out(recipe: Recipe, always_on: Tensor, weight: Tensor, statistics: TokenStatistics) -> Tensor:
    """Share the tokens that are not always on out among experts by the feature that a recipe names.

    `rows` and `context` are balanced k-means on the rows of the head and on the mean hidden states in which a token is
    likely. `frequency` sorts the tokens by their mean probability and cuts them into runs.

    Args:
        recipe: names the feature, the size of an expert and the seed.
        always_on: token ids that no expert gets, int64 [A].
        weight: W, [V, d].
        statistics: of the tokens over the sample.

    Returns:
        Token ids, int64 [M, S]: ascending in each expert; the last ones repeat their expert's first id to fill it up.
    """
    routed = torch.ones(weight.shape[0], dtype=torch.bool).index_fill_(0, always_on, False).nonzero().squeeze(-1)
    if recipe.partition == "frequency":
        probabilities = statistics.probabilities.cpu()[routed]
        return _runs(routed[probabilities.argsort(descending=True, stable=True)], recipe.expert_size)
    features = weight if recipe.partition == "rows" else statistics.contexts
    return routed[partition(features[routed.to(features.device)], recipe.expert_size, recipe.seed)]


def _runs(ordered: Tensor, expert_size: int) -> Tensor:
    """Token ids in their order, [n], to runs of neighbours, [M, S]."""
    runs = [run.sort().values for run in ordered.split(expert_size)]
    runs[-1] = torch.cat([runs[-1], runs[-1][:1].expand(expert_size - len(runs[-1]))])
    return torch.stack(runs)
