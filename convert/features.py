"""What decides which tokens share an expert: their rows of the head, how frequent they are, or their contexts."""

import torch
from torch import Tensor

from .distill import mean_states
from .partition import partition
from .recipe import Recipe


def share_out(
    recipe: Recipe, always_on: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None, probabilities: Tensor
) -> Tensor:
    """Share the tokens that are not always on out among experts by the feature that a recipe names.

    `rows` and `context` are balanced k-means on the rows of the head and on the mean hidden states in which a token is
    likely. `frequency` sorts the tokens by their mean probability and cuts them into runs.

    Args:
        recipe: names the feature, the size of an expert and the seed.
        always_on: token ids that no expert gets, int64 [A].
        states: hidden states of the sample, [N, d].
        weight: W, [V, d].
        bias: [V] or None.
        probabilities: mean probability of each token over the sample, [V].

    Returns:
        Token ids, int64 [M, S]: ascending in each expert; the last ones repeat their expert's first id to fill it up.
    """
    routed = torch.ones(weight.shape[0], dtype=torch.bool).index_fill_(0, always_on, False).nonzero().squeeze(-1)
    if recipe.partition == "frequency":
        return _runs(routed[probabilities.cpu()[routed].argsort(descending=True, stable=True)], recipe.expert_size)
    features = weight if recipe.partition == "rows" else mean_states(states, weight, bias)
    return routed[partition(features[routed.to(features.device)], recipe.expert_size, recipe.seed)]


def _runs(ordered: Tensor, expert_size: int) -> Tensor:
    """Token ids in their order, [n], to runs of neighbours, [M, S]."""
    runs = [run.sort().values for run in ordered.split(expert_size)]
    runs[-1] = torch.cat([runs[-1], runs[-1][:1].expand(expert_size - len(runs[-1]))])
    return torch.stack(runs)
