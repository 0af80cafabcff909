"""Speed of the head alone: dense, baselines, sparse."""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..model.certified_screen import greedy_logits_of
from ..model.crossover import MOST_POSITIONS
from ..model.head import TopKExpertsHead
from ..model.kernels import gather_dot_sharing
from ..model.lossless import LosslessStats
from ..model.token_chooser import TokenChooser
from .baselines import (
    BASELINES,
    HnswHead,
    MissingPackageError,
    captured,
    compiled,
    has_compiler,
    int8_head,
    linear_of,
    random_flashhead,
)
from .competitors import Competitors
from .decode_speed import warpers
from .timing import Spread, head_seconds

Head = Callable[[Tensor], Any]

PICKS = 256  # states whose picked experts the timed parts cycle through
PROMPT_POSITIONS = 256

GRAPHS = ("dense_bfloat16", "dense_float32", "sparse", "flashhead")  # also timed as CUDA graphs

# In the results, each is the fastest of its variants.
BEST_OF = {
    "dense": ("dense_bfloat16", "dense_float32"),
    "dense_sampling": ("dense_sampling_bfloat16", "dense_sampling_float32"),
    "dense_graph": ("dense_bfloat16_graph", "dense_float32_graph"),
    "int8": ("int8_eager", "int8_compiled"),
}


class Heads:
    """All heads over one weight.

    Attributes:
        states: hidden states to time them on, [P, d].
    """

    def __init__(self, models: Competitors, states: Tensor, without: tuple[str, ...] = ()) -> None:
        """Build the baselines; skip those whose package is missing, with a line on stderr.

        Args:
            models: the competitors.
            states: hidden states to time them on, [P, d], in the dtype of the head.
            without: names of baselines to skip.
        """
        self.states = states
        self._sparse = models.sparse.head
        weight, bias = self._sparse.weight.detach(), self._sparse.bias
        self._runs: dict[str, Head] = {}
        for dtype in (torch.bfloat16, torch.float32):
            name, dense = str(dtype).removeprefix("torch."), _dense(weight, bias, dtype)
            self._runs[f"dense_{name}"] = dense
            if weight.is_cpu:  # elsewhere ours is not timed with sampling
                self._runs[f"dense_sampling_{name}"] = _sampled(dense)
        self._int8: Head | None = None
        for name in BASELINES:
            if name not in without:
                self._build(name, weight, bias)

    def _build(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        try:
            if name == "int8":
                self._int8 = int8_head(weight, bias)
            elif name == "flashhead":
                self._runs["flashhead"] = random_flashhead(weight, bias).next_tokens
            else:
                self._runs["hnsw"] = HnswHead(weight, bias)
        except MissingPackageError as error:
            print(f"{name} is skipped: {error}", file=sys.stderr)

    def batch(self, size: int, rounds: int) -> dict[str, Spread]:
        """Time all heads on a batch.

        Args:
            size: positions per call.
            rounds: calls of each.

        Returns:
            Seconds per call by name; `dense` and `int8` are the fastest of their variants.
        """
        torch.compiler.reset()  # torch limits recompilations of a function
        return self._time(size, rounds, {})

    def _time(self, size: int, rounds: int, extra: dict[str, Head]) -> dict[str, Spread]:
        runs = {**self._runs, **self._sparse_runs(), **extra}
        if self.states.is_cuda:
            runs |= {f"{name}_graph": captured(runs[name], self.states[:size]) for name in GRAPHS if name in runs}
        if self._int8 is not None:
            runs["int8_eager"] = self._int8
            if has_compiler():
                runs["int8_compiled"] = compiled(self._int8, self.states[:size])
        spreads = head_seconds(runs, self.states, size, rounds, f"Timing the head on {size} positions")
        for name, variants in BEST_OF.items():
            if measured := [spreads[variant] for variant in variants if variant in spreads]:
                spreads[name] = min(measured, key=lambda spread: spread.median)
        return spreads

    def _sparse_runs(self) -> dict[str, Head]:
        head = self._sparse
        if head.weight.device.type != "cpu":  # tokens are chosen from logits of the whole vocabulary there
            return {"sparse": head.sparse_logits, "auto": _auto(head)}
        return {
            "sparse": _next_token(head, (), does_sample=False),
            "sampling": _next_token(head, warpers(), does_sample=True),
            "sparse_all_logits": head.sparse_logits,
            "auto": _auto(head),
        }

    def prompt(self, rounds: int) -> dict[str, Spread]:
        """Time the dense head and head mode "auto" in a prefill of 256 positions.

        Args:
            rounds: calls of each.

        Returns:
            Seconds per call, by name.
        """
        runs: dict[str, Head] = {"dense": self._sparse.dense_logits, "auto": _auto(self._sparse)}
        return head_seconds(
            runs, self.states, PROMPT_POSITIONS, rounds, f"Timing the head on {PROMPT_POSITIONS} positions"
        )

    def auto_sparse_up_to(self) -> int:
        """The most positions, a power of two, that head mode "auto" runs sparse for logits of all tokens."""
        self._sparse.head_mode = "auto"
        sizes = (1 << power for power in range(MOST_POSITIONS.bit_length()))
        return max((size for size in sizes if self._sparse.runs_sparse(size)), default=0)

    def tail_share(self) -> float:
        """Share of the states where the tail could win, so greedy decoding computes it."""
        needed = [self._sparse.tail_may_win(self._sparse.score(some)) for some in self.states.split(PICKS)]
        return float(torch.cat(needed).float().mean())

    def one_position(self, stats: LosslessStats, rounds: int, is_compiled: bool) -> dict[str, Spread]:
        """Time all heads on one position, also for lossless decoding.

        A lossless token takes `forward_passes_per_token` runs of the drafting head on one position and
        `dense_passes_per_token` verification passes. Both are timed, the latter on the mean number of positions
        that are verified at once, and added.

        Args:
            stats: of lossless decoding.
            rounds: calls of each.
            is_compiled: whether to time the dense and the sparse head compiled as well.
        """
        passes = stats.dense_passes_per_token
        blocks = itertools.cycle(self.states.split(max(1, round(1 / passes))))
        verify = greedy_logits_of(self._sparse)
        extra: dict[str, Head] = {
            "draft": lambda hidden: _draft(self._sparse, hidden),
            "verification": lambda _: verify(next(blocks)),
            **_parts(self._sparse, self.states),
        }
        if is_compiled:
            runs = {"dense": self._sparse.dense_logits, "sparse": self._sparse.sparse_logits}
            extra |= {f"{name}_compiled": compiled(run, self.states[:1]) for name, run in runs.items()}
        spreads = self._time(1, rounds, extra)
        draft, verification = spreads["draft"], spreads["verification"]
        steps = stats.forward_passes_per_token
        spreads["lossless"] = Spread(
            steps * draft.median + passes * verification.median,
            steps * draft.low + passes * verification.low,
            steps * draft.high + passes * verification.high,
        )
        return spreads


def _dense(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
    """The dense head of Transformers, a linear layer, in a given dtype, which the states are cast to first."""
    layer = linear_of(weight.to(dtype), None if bias is None else bias.to(dtype))
    return lambda hidden: layer(hidden.to(dtype))


def _sampled(dense: Head) -> Head:
    """A dense head and the choice of the token, as Transformers samples."""
    chain: Any = LogitsProcessorList(warpers())

    def run(hidden: Tensor) -> Tensor:
        scores = chain(hidden.new_empty(len(hidden), 0), dense(hidden).float())
        return scores.softmax(dim=-1).multinomial(1)

    return run


def _parts(head: TopKExpertsHead, states: Tensor) -> dict[str, Head]:
    """Parts of the sparse head: router, screen, copy of the scored rows, and copy with products.

    Experts and rows were picked for other states beforehand.
    """
    scored = head.score(states[:PICKS])
    picked, rows = itertools.cycle(scored.experts.split(1)), itertools.cycle(scored.ids.split(1))

    def screen(hidden: Tensor) -> Tensor:
        return head.tail.screen(hidden, next(picked))

    def gather(_: Tensor) -> Tensor:
        return head.weight.index_select(0, next(rows)[0])

    def multiply(hidden: Tensor) -> Any:
        return gather_dot_sharing(hidden, head.weight, head.bias, next(rows), head.num_always_on)

    screening: dict[str, Head] = {"part_screen": screen} if head.screens else {}
    return {"part_router": head.router, **screening, "part_gather": gather, "part_gather_dot": multiply}


def _draft(head: TopKExpertsHead, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What lossless decoding computes in the head for a greedy draft token."""
    scored = head.score(hidden)
    return head.mass_outside(scored), head.best_scored(scored)


def _next_token(head: TopKExpertsHead, found: Sequence[LogitsProcessor], does_sample: bool) -> Head:
    """The head as `generate` runs it with these processors, including the choice of the token."""
    chooser = TokenChooser(head, found, does_sample)
    return lambda hidden: chooser.choose(hidden.new_empty(len(hidden), 0), head.score(hidden))


def _auto(head: TopKExpertsHead) -> Head:
    """The head as the model calls it, in head mode "auto", which is set here."""
    head.head_mode = "auto"
    return lambda hidden: head(hidden.unsqueeze(1))
