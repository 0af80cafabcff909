"""The head by itself: dense, the methods of others, ours."""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor

from ..model.crossover import MOST_POSITIONS
from ..model.head import TopKExpertsHead
from ..model.kernels import gather_dot, shared_rows_dot
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
    random_flashhead,
)
from .competitors import Competitors
from .decode_speed import warpers
from .timing import Spread, head_seconds

Head = Callable[[Tensor], Any]

PICKS = 256  # states whose picks the parts go through
PROMPT_POSITIONS = 256

GRAPHS = ("dense_bfloat16", "dense_float32", "sparse", "flashhead")  # timed as CUDA graphs, too

# Named in the results by the faster of its ways to run.
BEST_OF = {
    "dense": ("dense_bfloat16", "dense_float32"),
    "dense_graph": ("dense_bfloat16_graph", "dense_float32_graph"),
    "int8": ("int8_eager", "int8_compiled"),
}


class Heads:
    """All heads over one weight.

    Attributes:
        states: hidden states that they are timed on, [P, d].
    """

    def __init__(self, models: Competitors, states: Tensor, without: tuple[str, ...] = ()) -> None:
        """Build the baselines that are not left out; those whose package is missing are, with a line on stderr.

        Args:
            models: the competitors.
            states: hidden states to time them on, [P, d], in the type of the head.
            without: names of baselines to leave out.
        """
        self.states = states
        self._sparse = models.sparse.head
        weight, bias = self._sparse.weight.detach(), self._sparse.bias
        self._runs: dict[str, Head] = {
            f"dense_{str(dtype).removeprefix('torch.')}": _dense(weight, bias, dtype)
            for dtype in (torch.bfloat16, torch.float32)
        }
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
            print(f"{name} is left out: {error}", file=sys.stderr)

    def batch(self, size: int, rounds: int) -> dict[str, Spread]:
        """Time all heads on so many positions.

        Args:
            size: positions in a call.
            rounds: calls of each.

        Returns:
            Seconds a call by name; `dense` and `int8` are the faster of the ways to run them.
        """
        torch.compiler.reset()  # torch compiles a function for so many sizes and then no more
        return self._time(size, rounds, {})

    def _time(self, size: int, rounds: int, extra: dict[str, Head]) -> dict[str, Spread]:
        runs = {**self._runs, **self._sparse_runs(), **extra}
        if self.states.is_cuda:
            runs |= {f"{name}_graph": captured(runs[name], self.states[:size]) for name in GRAPHS if name in runs}
        if self._int8 is not None:
            runs["int8_eager"] = self._int8
            if has_compiler():
                runs["int8_compiled"] = compiled(self._int8, self.states[:size])
        spreads = head_seconds(runs, self.states, size, rounds, f"Timing the head, {size} at once")
        for name, ways in BEST_OF.items():
            if measured := [spreads[way] for way in ways if way in spreads]:
                spreads[name] = min(measured, key=lambda spread: spread.median)
        return spreads

    def _sparse_runs(self) -> dict[str, Head]:
        head = self._sparse
        if head.weight.device.type != "cpu":  # where tokens are chosen from the logits of all
            return {"sparse": head.sparse_logits, "auto": _auto(head)}
        return {
            "sparse": _next_token(head, (), does_sample=False),
            "sampling": _next_token(head, warpers(), does_sample=True),
            "sparse_all_logits": head.sparse_logits,
            "auto": _auto(head),
        }

    def prompt(self, rounds: int) -> dict[str, Spread]:
        """Time the dense head and ours in head mode "auto" on as many positions as a prompt has.

        Args:
            rounds: calls of each.

        Returns:
            Seconds a call, by name.
        """
        runs: dict[str, Head] = {"dense": self._sparse.dense_logits, "auto": _auto(self._sparse)}
        return head_seconds(runs, self.states, PROMPT_POSITIONS, rounds, f"Timing the head, {PROMPT_POSITIONS} at once")

    def auto_sparse_up_to(self) -> int:
        """Up to how many positions, a power of two, head mode "auto" makes logits of all tokens the sparse way."""
        self._sparse.head_mode = "auto"
        sizes = (1 << power for power in range(MOST_POSITIONS.bit_length()))
        return max((size for size in sizes if self._sparse.runs_sparse(size)), default=0)

    def tail_share(self) -> float:
        """Share of the states at which the tail could win, so that greedy decoding computes it."""
        needed = [self._sparse.tail_may_win(self._sparse.score(some)) for some in self.states.split(PICKS)]
        return float(torch.cat(needed).float().mean())

    def one_position(self, stats: LosslessStats, rounds: int, is_compiled: bool) -> dict[str, Spread]:
        """Time all heads on one position, lossless decoding's among them.

        A lossless token takes `forward_passes_per_token` runs of the drafting head on one position and
        `dense_passes_per_token` runs of the dense head on a block. Both are timed, the latter on as many positions as
        the blocks had on average, and added up.

        Args:
            stats: what lossless decoding took.
            rounds: calls of each.
            is_compiled: whether to time the dense and the sparse head compiled, too.
        """
        passes = stats.dense_passes_per_token
        block = self.states[: max(1, round(1 / passes))].unsqueeze(0)
        extra: dict[str, Head] = {
            "draft": lambda hidden: _draft(self._sparse, hidden),
            "dense_block": lambda _: self._sparse.dense_logits(block),
            **_parts(self._sparse, self.states),
        }
        if is_compiled:
            runs = {"dense": self._sparse.dense_logits, "sparse": self._sparse.sparse_logits}
            extra |= {f"{name}_compiled": compiled(run, self.states[:1]) for name, run in runs.items()}
        spreads = self._time(1, rounds, extra)
        draft, dense = spreads["draft"], spreads["dense_block"]
        steps = stats.forward_passes_per_token
        spreads["lossless"] = Spread(
            steps * draft.median + passes * dense.median,
            steps * draft.low + passes * dense.low,
            steps * draft.high + passes * dense.high,
        )
        return spreads


def _dense(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
    """The dense head as Transformers runs it, in a type; states are rounded to it beforehand, where they differ."""
    weight, bias = weight.to(dtype), None if bias is None else bias.detach().to(dtype)

    def run(hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(dtype), weight, bias)

    return run


def _parts(head: TopKExpertsHead, states: Tensor) -> dict[str, Head]:
    """Parts of the sparse head by themselves: router, screen, the copy of the rows scored, and that with products.

    Experts and rows are those that other states pick, found beforehand.
    """
    scored = head.score(states[:PICKS])
    picked, rows = itertools.cycle(scored.experts.split(1)), itertools.cycle(scored.ids.split(1))

    def screen(hidden: Tensor) -> Tensor:
        return head.tail.screen(hidden, next(picked))

    def gather(_: Tensor) -> Tensor:
        return head.weight.index_select(0, torch.cat([head.always_on_ids, next(rows)[0]]))

    def multiply(hidden: Tensor) -> Any:
        always, routed = head.always_on_ids, next(rows)
        if not head.screens:
            return shared_rows_dot(hidden, head.weight, head.bias, torch.cat([always, routed[0]]))
        of_always = shared_rows_dot(hidden, head.weight, head.bias, always)
        return of_always, gather_dot(hidden, head.weight, head.bias, routed)

    of_screen: dict[str, Head] = {"part_screen": screen} if head.screens else {}
    return {"part_router": head.router, **of_screen, "part_gather": gather, "part_gather_dot": multiply}


def _draft(head: TopKExpertsHead, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What lossless decoding takes from the head for a draft of greedy decoding."""
    scored = head.score(hidden)
    return head.share_outside(scored), head.best_scored(scored)


def _next_token(head: TopKExpertsHead, found: Sequence[LogitsProcessor], does_sample: bool) -> Head:
    """The head as `generate` runs it with these processors: it chooses the token, too."""
    chooser = TokenChooser(head, found, does_sample)
    return lambda hidden: chooser.choose(hidden.new_empty(0), head.score(hidden))


def _auto(head: TopKExpertsHead) -> Head:
    """The head as a model calls it, in head mode "auto"."""

    def run(hidden: Tensor) -> Tensor:
        head.head_mode = "auto"
        return head(hidden.unsqueeze(1))

    return run
