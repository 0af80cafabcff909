"""Interleaved timing: every round runs each competitor once, so that all see the same state of the machine.

The load of a machine changes by the minute, so only timings of interleaved rounds in one process are comparable.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..progress import progress

ROUNDS = 50
WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles.

    Attributes:
        median: of the measurements.
        low: the first quartile.
        high: the third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Summarise measurements, at least one."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(
    runs: Mapping[str, Callable[[Any], float | None]],
    fresh: Callable[[], Any],
    rounds: int,
    description: str,
    warm_up_rounds: int = WARM_UP_ROUNDS,
) -> dict[str, Spread]:
    """Measure competitors in interleaved rounds.

    Args:
        runs: competitors by name; each takes an input and returns its measurement, or None to be timed in seconds.
        fresh: makes the input of a round, the same for all; not timed.
        rounds: measurements of each.
        description: for the progress line.
        warm_up_rounds: rounds that are run first and not counted.

    Returns:
        The spread of the measurements, by name.
    """
    measured: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    with progress(description, warm_up_rounds + rounds, "rounds") as advance:
        for number in range(warm_up_rounds + rounds):
            given = fresh()
            shuffle(order)  # the previous run determines the contents of the caches
            for name in order:
                started = time.perf_counter()
                result = runs[name](given)
                taken = time.perf_counter() - started
                if number >= warm_up_rounds:
                    measured[name].append(taken if result is None else result)
            advance()
    return {name: Spread.of(values) for name, values in measured.items()}


def clocked(run: Callable[[Tensor], Any]) -> Callable[[Tensor], float | None]:
    """Wrap a function to be timed: on CUDA it returns the seconds between two events, elsewhere None."""

    def measured(hidden: Tensor) -> float | None:
        if not hidden.is_cuda:
            run(hidden)
            return None
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        run(hidden)
        ended.record()
        ended.synchronize()
        return started.elapsed_time(ended) / 1000

    return measured


@torch.inference_mode()
def head_seconds(
    runs: Mapping[str, Callable[[Tensor], Any]], states: Tensor, positions: int, rounds: int, description: str
) -> dict[str, Spread]:
    """Time heads, in each round on different hidden states.

    Args:
        runs: heads by name, callables on hidden states [N, d].
        states: hidden states to draw from, [P, d].
        positions: N, hidden states per call.
        rounds: calls of each.
        description: for the progress line.

    Returns:
        Seconds per call, by name.
    """
    return interleaved(
        {name: clocked(run) for name, run in runs.items()},
        lambda: states[torch.randint(len(states), (positions,))],
        rounds,
        description,
    )


class TokenClock(BaseStreamer):
    """A streamer that records the time of each token."""

    def __init__(self) -> None:
        """Start with no token."""
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Record the time; called with the prompt, and with every new token of each row."""
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""

    @property
    def seconds_per_token(self) -> float:
        """Mean time per token after the first, whose time is that of the prefill."""
        first, last = self._times[1], self._times[-1]
        return (last - first) / (len(self._times) - 2)
