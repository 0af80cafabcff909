"""Whether the sparse head is the faster one where it runs: measured at first use, once for each kind of call."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .whole_head import is_one_of_several

MOST_POSITIONS = 64  # with more, the dense head is bound by arithmetic
FIRST_GUESS = 4  # positions up to which it is taken for faster where it cannot be measured
ROUNDS, SECONDS = 5, 0.2  # of a measurement, at most; two rounds at least
WORTH_IT = 0.95  # of the dense head's time: less of a gain than that is noise

_measured: dict[tuple[Any, ...], bool] = {}


def is_faster(
    sparse: Callable[[Tensor], Any], dense: Callable[[Tensor], Any], head: nn.Linear, positions: int, *sizes: Any
) -> bool:
    """Whether one way to run a head is faster than the dense one, on this machine and with its number of threads.

    Args:
        sparse: from hidden states [N, d].
        dense: the dense head, from the same.
        head: whose weight it is.
        positions: N.
        *sizes: what the time of the sparse one depends on besides.

    Returns:
        What was measured, with N rounded up to a power of two; a guess while code is compiled or a graph is captured,
        and where several processes run, which would measure each for itself and have to agree.
    """
    if positions > MOST_POSITIONS:
        return False
    bucket = 1 << (positions - 1).bit_length()
    if is_one_of_several():
        return bucket <= FIRST_GUESS
    weight = head.weight
    case = (weight.device, weight.dtype, weight.shape, torch.get_num_threads(), bucket, *sizes)
    if case not in _measured:
        if torch.compiler.is_compiling() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            return bucket <= FIRST_GUESS
        _measured[case] = _measure(sparse, dense, weight, bucket)
    return _measured[case]


@torch.no_grad()
def _measure(sparse: Callable[[Tensor], Any], dense: Callable[[Tensor], Any], weight: Tensor, positions: int) -> bool:
    """Time both side by side on random states."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(positions, weight.shape[1], generator=generator).to(weight)
    seconds: dict[Any, list[float]] = {sparse: [], dense: []}
    for run in (sparse, dense):  # what is made at first use
        run(states)
    started = time.perf_counter()
    for done in range(ROUNDS):
        for run, times in seconds.items():
            times.append(seconds_of(partial(run, states), weight.device))
        if done > 0 and time.perf_counter() - started > SECONDS:
            break
    return min(seconds[sparse]) <= WORTH_IT * min(seconds[dense])


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """How long something takes on a device, which is waited for."""
    started = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
