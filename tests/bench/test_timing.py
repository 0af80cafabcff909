"""Timing: interleaved rounds, and tokens/s without the first token; no test depends on measured times."""

from collections.abc import Callable

import pytest
import torch

from hf_topk.bench import timing
from hf_topk.bench.timing import Spread, TokenClock, interleaved


def test_every_round_runs_everything_once_on_the_same_input() -> None:
    seen: dict[str, list[int]] = {"one": [], "other": []}
    numbers = iter(range(100))

    def run(name: str) -> Callable[[int], float]:
        def measured(number: int) -> float:
            seen[name].append(number)
            return float(number)

        return measured

    spreads = interleaved({name: run(name) for name in seen}, lambda: next(numbers), 5, "Testing", warm_up_rounds=2)
    assert seen["one"] == seen["other"] == list(range(7))
    assert spreads["one"] == spreads["other"] == Spread(4.0, 3.0, 5.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_the_clock_excludes_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 10.0, 11.0, 13.0])  # prompt, first token, two more
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    clock = TokenClock()
    for _ in range(4):
        clock.put(torch.zeros(1))
    assert clock.seconds_per_token == 1.5
