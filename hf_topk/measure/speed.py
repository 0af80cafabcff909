"""How long the head takes."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..head import TopKExpertsHead

ROUNDS = 50
WARM_UP_ROUNDS = 5


@torch.inference_mode()
def head_milliseconds(head: TopKExpertsHead, positions: int = 1, rounds: int = ROUNDS) -> dict[str, float]:
    """Time the dense and the sparse head side by side, in interleaved rounds on fresh random states.

    Args:
        head: the head of a converted model.
        positions: hidden states in a call.
        rounds: calls of each.

    Returns:
        Median milliseconds a call, under "dense" and "sparse".
    """
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": lambda hidden: torch.nn.functional.linear(hidden, head.weight, head.bias),
        "sparse": head.sparse_logits,
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(WARM_UP_ROUNDS + rounds):
        hidden = torch.randn(positions, head.in_features).to(head.weight)  # made before the clock runs
        for name, run in runs.items():
            started = time.perf_counter()
            run(hidden)
            if number >= WARM_UP_ROUNDS:
                seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}
