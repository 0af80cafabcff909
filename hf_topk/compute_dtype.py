"""The dtype to compute in: a model's own, or float32 if that is faster, as on CPUs that emulate bfloat16."""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch.nn import functional as F

from .model.crossover import least_seconds

# Positions per forward pass: CPUs that emulate bfloat16 multiply many positions faster in float32; but one position
# waits for memory, of which bfloat16 reads half.
READING, DECODING = 32, 1
ROWS = {READING: 1 << 10, DECODING: 1 << 14}  # of the weight that is timed, for one position more than caches hold
COLUMNS, ROUNDS = 512, 20
MIN_SPEED_UP = 1.2  # of float32, as it takes twice the memory


@cache
def faster_dtype(own: torch.dtype, device: torch.device, positions: int = READING) -> torch.dtype:
    """The faster of a model's own dtype and float32, measured once per process in some hundredths of a second.

    Args:
        own: the dtype that the model is stored in.
        device: to compute on.
        positions: per forward pass, `READING` or `DECODING`.
    """
    if own.itemsize >= torch.float32.itemsize:
        return own
    seconds, in_float32 = _least_seconds((own, torch.float32), device, positions)
    return torch.float32 if seconds > MIN_SPEED_UP * in_float32 else own


def _least_seconds(dtypes: Sequence[torch.dtype], device: torch.device, positions: int) -> list[float]:
    """The shortest time of matrix products in each dtype."""
    runs = []
    for dtype in dtypes:
        states, weight = (torch.ones(n, COLUMNS, dtype=dtype, device=device) for n in (positions, ROWS[positions]))
        runs.append(partial(F.linear, states, weight))
    return least_seconds(runs, device, ROUNDS)
