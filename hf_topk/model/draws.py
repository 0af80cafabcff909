"""Draws in proportion to weights, by inversion of the cumulative distribution.

This is several times as fast as `torch.multinomial` on a CPU.
"""

import torch
from torch import Tensor


def draw(logits: Tensor) -> Tensor:
    """Draw an index per row from the softmax of logits: fp32 [B, n] to [B, 1]."""
    return drawn_by((logits - logits.amax(dim=-1, keepdim=True)).exp())


def drawn_by(weights: Tensor, num_likely: int = 0, total: Tensor | None = None) -> Tensor:
    """Draw an index per row in proportion to weights.

    Args:
        weights: fp32 [B, n].
        num_likely: the first of each row, which have most of the weight; the others are not read while no draw falls
            on them.
        total: the sums of the weights, [B, 1], if some are likely.

    Returns:
        Indices, [B, 1].
    """
    uniform = torch.rand(len(weights), 1, dtype=torch.float64)
    if total is not None and num_likely < weights.shape[1]:
        sums, targets = weights[:, :num_likely].cumsum(dim=-1, dtype=torch.float64), uniform * total
        if (targets < sums[:, -1:]).all():
            return torch.searchsorted(sums, targets, right=True)
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp_max(weights.shape[1] - 1)
