"""The dtype to compute in: a model's own, or float32 if that is faster, as on CPUs that emulate bfloat16."""

from functools import cache, partial

import torch
from torch.nn import functional as F

from .model.crossover import seconds_of

POSITIONS, SIZE, ROUNDS = 32, 512, 5  # of the matrix products that are timed
MIN_SPEED_UP = 1.2  # of float32, as it takes twice the memory


@cache
def faster_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The faster of a model's own dtype and float32, measured once per process in some hundredths of a second.

    Args:
        own: the dtype that the model is stored in.
        device: to compute on.
    """
    if own.itemsize >= torch.float32.itemsize:
        return own
    return torch.float32 if _seconds(own, device) > MIN_SPEED_UP * _seconds(torch.float32, device) else own


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The shortest time of a few matrix products."""
    states, weight = (torch.ones(rows, SIZE, dtype=dtype, device=device) for rows in (POSITIONS, 2 * SIZE))
    return min(seconds_of(partial(F.linear, states, weight), device) for _ in range(ROUNDS))
