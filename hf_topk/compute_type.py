"""The number type to compute in: a model's own, or float32 where that is faster, as on processors that emulate it."""

from functools import cache, partial

import torch
from torch.nn import functional as F

from .model.crossover import seconds_of

POSITIONS, SIZE, ROUNDS = 32, 512, 5  # of the products that are timed
WORTH_IT = 1.2  # how much faster float32 has to be, for it takes twice the memory


@cache
def faster_type(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The faster one of a model's own type and float32, as measured once a process in some hundredths of a second.

    Args:
        own: the type that the model is stored in.
        device: where it is going to compute.
    """
    if own.itemsize >= torch.float32.itemsize:
        return own
    return torch.float32 if _seconds(own, device) > WORTH_IT * _seconds(torch.float32, device) else own


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Time of a matrix product, the shortest of a few."""
    states, weight = (torch.ones(rows, SIZE, dtype=dtype, device=device) for rows in (POSITIONS, 2 * SIZE))
    return min(seconds_of(partial(F.linear, states, weight), device) for _ in range(ROUNDS))
