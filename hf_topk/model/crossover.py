"""Measures whether the sparse head is faster than the dense one on this machine, at the first call of each size."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .whole_head import is_one_of_several

MOST_POSITIONS = 64  # with more, the dense head is compute-bound
UNMEASURED_LIMIT = 4  # positions up to which it counts as faster where it cannot be measured
ROUNDS, SECONDS = 5, 0.2  # limits of a measurement, which takes at least two rounds
WORTH_IT = 0.95  # of the dense head's time; a smaller gain is noise

_measured: dict[tuple[Any, ...], bool] = {}


def is_faster(
    sparse: Callable[[Tensor], Any], dense: Callable[[Tensor], Any], head: nn.Linear, positions: int, *sizes: Any
) -> bool:
    """Whether the sparse head is faster than the dense one, on this machine with this number of threads.

    Args:
        sparse: a function of hidden states [N, d].
        dense: the dense head, a function of the same.
        head: whose weight both read.
        positions: N.
        *sizes: other values that the time of the sparse head depends on.

    Returns:
        The result of a measurement, with N rounded up to a power of two. Without one, a fixed rule: while code is
        compiled or a graph is captured, and in distributed runs, whose processes have to agree.
    """
    if positions > MOST_POSITIONS:
        return False
    bucket = 1 << (positions - 1).bit_length()
    if is_one_of_several():
        return bucket <= UNMEASURED_LIMIT
    weight = head.weight
    case = (weight.device, weight.dtype, weight.shape, torch.get_num_threads(), bucket, *sizes)
    if case not in _measured:
        if torch.compiler.is_compiling() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return bucket <= UNMEASURED_LIMIT
        _measured[case] = _measure(sparse, dense, weight, bucket)
    return _measured[case]


@torch.no_grad()
def _measure(sparse: Callable[[Tensor], Any], dense: Callable[[Tensor], Any], weight: Tensor, positions: int) -> bool:
    """Time both in turn on random hidden states."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(positions, weight.shape[1], generator=generator).to(weight)
    seconds: dict[Any, list[float]] = {sparse: [], dense: []}
    for run in (sparse, dense):  # warm-up
        run(states)
    started = time.perf_counter()
    for done in range(ROUNDS):
        for run, times in seconds.items():
            times.append(seconds_of(partial(run, states), weight.device))
        if done > 0 and time.perf_counter() - started > SECONDS:
            break
    return min(seconds[sparse]) <= WORTH_IT * min(seconds[dense])


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, with the synchronisation of its device."""
    started = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
