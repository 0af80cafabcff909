"""Measures whether the sparse head is faster than the dense one on this machine, at the first call of each size."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .whole_head import is_one_of_several

MOST_POSITIONS = 64  # with more, the dense head is compute-bound
UNMEASURED_LIMIT = 4  # positions up to which it counts as faster where it cannot be measured
ROUNDS, SECONDS = 5, 0.2  # limits of a measurement, which takes at least two rounds
WORTH_IT = 0.95  # of the dense head's time; a smaller gain is noise

Run = Callable[[Tensor], Any]

_measured: dict[tuple[Any, ...], bool] = {}


def is_faster(sparse: Run, dense: Run, head: nn.Linear, positions: int, *sizes: Any) -> bool:
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

    def measure(states: Tensor) -> bool:
        of_sparse, of_dense = least_seconds((partial(sparse, states), partial(dense, states)), states.device)
        return of_sparse <= WORTH_IT * of_dense

    return _known(measure, head, positions, *sizes)


def drafting_is_faster(
    draft: Run, dense: Run, verify: Run, head: nn.Linear, rows: int, block: int, *sizes: Any
) -> bool:
    """Whether lossless decoding is faster than dense decoding if all draft tokens are accepted; see [`is_faster`].

    A block of n positions takes n draft passes of the sparse head and one verification pass. Without the processor's
    help for a dtype, that pass can take as long as n passes of one position.

    Args:
        draft: what the sparse head computes for a draft token, a function of hidden states [B, d].
        dense: the dense head, a function of the same.
        verify: the verification pass, a function of hidden states [n B, d].
        head: whose weight both read.
        rows: B.
        block: n, positions of each row.
        *sizes: other values that the time of the sparse head depends on.
    """

    def measure(states: Tensor) -> bool:
        runs = (partial(draft, states), partial(dense, states), partial(verify, states.repeat(block, 1)))
        of_draft, of_dense, of_block = least_seconds(runs, states.device)
        return of_draft + of_block / block <= WORTH_IT * of_dense

    return _known(measure, head, rows, block, *sizes)


def _known(measure: Callable[[Tensor], bool], head: nn.Linear, positions: int, *sizes: Any) -> bool:
    """The result of a measurement on random hidden states, [N, d], made once for each case; or the fixed rule."""
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
        generator = torch.Generator().manual_seed(0)
        _measured[case] = measure(torch.randn(bucket, weight.shape[1], generator=generator).to(weight))
    return _measured[case]


@torch.no_grad()
def least_seconds(runs: Sequence[Callable[[], Any]], device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """The shortest time of each, in turn, as other work on the machine comes and goes."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:  # warm-up
        run()
    started = time.perf_counter()
    for done in range(rounds):
        for run, own in zip(runs, times, strict=True):
            own.append(seconds_of(run, device))
        if done > 0 and time.perf_counter() - started > SECONDS:
            break
    return [min(own) for own in times]


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes, with the synchronisation of its device."""
    started = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
