"""Recursive bisection of the tokens into experts of equal size: a quick start for balanced k-means."""

import torch
from torch import Tensor
from torch.nn import functional as F

POWER_ITERATIONS, REFINEMENTS = 6, 6
ELEMENTS_AT_ONCE = 2**24


def bisect(rows: Tensor, num_experts: int, expert_size: int) -> Tensor:
    """Split the rows in two halves with near equal numbers of experts, and each half again, down to single experts.

    Each split is a balanced 2-means: rows are sorted along the line between the two means, at first along the leading
    principal direction, and cut where each half has its number of rows.

    Args:
        rows: fp32 [n, d].
        num_experts: M.
        expert_size: S, with M S at least n. The last expert has the empty slots.

    Returns:
        The expert of each row, int64 [n].
    """
    slots = num_experts * expert_size
    order = torch.cat([torch.arange(len(rows)), torch.full((slots - len(rows),), -1)])
    parts = [(0, num_experts)]  # of each part: its first expert, its number of experts
    while any(count > 1 for _, count in parts):
        for count in sorted({count for _, count in parts} - {1}):  # at most two values
            starts = torch.tensor([first for first, some in parts if some == count]) * expert_size
            places = starts.unsqueeze(-1) + torch.arange(count * expert_size)
            at_once = max(1, ELEMENTS_AT_ONCE // (places.shape[1] * rows.shape[1]))
            for some in places.split(at_once):
                order[some] = _cut(rows, order[some], count // 2 * expert_size)
        parts = [half for first, count in parts for half in _halves(first, count)]
    expert_of = torch.empty(len(rows), dtype=torch.long)
    is_row = order >= 0
    expert_of[order[is_row]] = (torch.arange(slots) // expert_size)[is_row]
    return expert_of


def _halves(first: int, count: int) -> list[tuple[int, int]]:
    half = count // 2
    return [(first, half), (first + half, count - half)] if half else [(first, count)]


def _cut(rows: Tensor, parts: Tensor, size: int) -> Tensor:
    """Sort the row indices of parts, [p, n]: the first `size` of each are one half; -1, an empty slot, goes last."""
    is_spare = parts < 0
    some = rows[parts.clamp_min(0)].masked_fill(is_spare.unsqueeze(-1), 0.0)
    some = some - some.mean(dim=1, keepdim=True)
    direction = some[:, :1].mT  # power iteration to the leading principal direction
    for _ in range(POWER_ITERATIONS):
        direction = F.normalize(some.mT @ (some @ direction), dim=1)
    for _ in range(REFINEMENTS):
        order = _along(some, direction, is_spare)
        share = torch.full_like(some[..., 0], 1.0 / (parts.shape[1] - size)).scatter_(1, order[:, :size], -1.0 / size)
        direction = some.mT @ share.unsqueeze(-1)  # between the means of the two halves
    return parts.gather(1, _along(some, direction, is_spare))


def _along(rows: Tensor, direction: Tensor, is_spare: Tensor) -> Tensor:
    return (rows @ direction).squeeze(-1).masked_fill(is_spare, torch.inf).argsort(dim=1)
