"""Clocks that put competing things side by side: every round runs each of them once, so that all see the same machine.

What a machine does besides changes by the minute; figures of one process and of interleaved rounds are compared, and no
others.
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
    """A median with its spread.

    Attributes:
        median: half of the measurements are below it.
        low: a quarter of them are.
        high: three quarters of them are.
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
    """Measure named things in rounds.

    Args:
        runs: each takes an input; what it returns is its measurement, or None for the seconds that it took.
        fresh: makes the input of a round, which is the same for all, before any clock runs.
        rounds: measurements of each.
        description: of what is measured, for the progress that is shown.
        warm_up_rounds: rounds before, that do not count.

    Returns:
        The spread of each one's measurements, by name.
    """
    measured: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    with progress(description, warm_up_rounds + rounds, "rounds") as advance:
        for number in range(warm_up_rounds + rounds):
            given = fresh()
            shuffle(order)  # what ran before decides what the caches hold
            for name in order:
                started = time.perf_counter()
                result = runs[name](given)
                taken = time.perf_counter() - started
                if number >= warm_up_rounds:
                    measured[name].append(taken if result is None else result)
            advance()
    return {name: Spread.of(values) for name, values in measured.items()}


def clocked(run: Callable[[Tensor], Any]) -> Callable[[Tensor], float | None]:
    """The same without its result: the clock measures it, or on CUDA events around it do."""

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
    """Time heads, in each round on other hidden states.

    Args:
        runs: heads, from hidden states [N, d].
        states: hidden states to draw from, [P, d].
        positions: N, hidden states in a call.
        rounds: calls of each.
        description: of what is measured, for the progress that is shown.

    Returns:
        Seconds a call, by name.
    """
    return interleaved(
        {name: clocked(run) for name, run in runs.items()},
        lambda: states[torch.randint(len(states), (positions,))],
        rounds,
        description,
    )


class TokenClock(BaseStreamer):
    """Notes when each token of a generation is there."""

    def __init__(self) -> None:
        """Start with no token."""
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time: called with the prompt, and with every new token of each row."""
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be done."""

    @property
    def seconds_a_token(self) -> float:
        """Mean time of a token after the first, which the prompt's length decides."""
        first, last = self._times[1], self._times[-1]
        return (last - first) / (len(self._times) - 2)
