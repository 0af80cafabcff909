"""The benchmark: head and end-to-end decoding of the dense model, the baselines, the converted model, and no head.

Competitors run in interleaved rounds in one process, and every ratio is of medians of the same rounds.
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.errors import InputError
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from .baselines import BASELINES, has_compiler
from .competitors import Competitors
from .decode_speed import Decoding, step_overheads
from .head_speed import Heads
from .prompts import Prompts
from .timing import Spread

BATCHES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 8
HEAD_ROUNDS_PER_ROUND = 5
OURS = ("sparse", "lossless", "auto", "sampling")  # prefixes of names
OTHERS = ("dense", *BASELINES, "dense_compiled", "dense_graph", "flashhead_graph")
OTHERS_OF = {"sampling": ("dense_sampling",)}  # in place of `OTHERS`
RESULTS = ("head", "prompt", "e2e", "e2e_compiled", "sampling", "sampling_compiled")
PACKAGES = ("hf-topk", "torch", "transformers", "torchao", "hnswlib")

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Choices:
    """What to measure.

    Attributes:
        batches: batch sizes.
        without: names of baselines to skip.
        compile: whether to measure compiled heads and decoding as well.
        rounds: of decoding; heads are timed in five times as many.

    Raises:
        InputError: when a baseline is unknown, a number is out of range, or there is no compiler.
    """

    batches: tuple[int, ...] = BATCHES
    without: tuple[str, ...] = ()
    compile: bool = False
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        for name in self.without:
            if name not in BASELINES:
                raise InputError(f"unknown baseline '{name}': choose one of {', '.join(BASELINES)}")
        if self.compile and not has_compiler():
            raise InputError("--compile needs a C++ compiler: install g++, or leave it out")
        for size in self.batches:
            if size not in range(1, BATCHES[-1] + 1):
                raise InputError(f"batch size {size} is out of range: choose from 1 to {BATCHES[-1]}")


@torch.inference_mode()
def bench(
    own: TopKExpertsForCausalLM,
    text_of: Callable[[Competitors], tuple[Tensor, Prompts]],
    choices: Choices | None = None,
    extractor: Any = None,
) -> Metrics:
    """Measure a converted model against its dense model and the baselines.

    Args:
        own: a converted model; its head mode and generation config are changed.
        text_of: returns hidden states to time the head on, [P, d], and what to decode from.
        choices: what to measure.
        extractor: the feature extractor of a speech model.

    Returns:
        Metrics by name, for JSON; null if skipped. Under `ratios`, `a_over_b` is the speed of a relative to b, and
        `a_share_of_ceiling` its speed relative to that without a head.

    Raises:
        InputError: when a speech model has no feature extractor, or an encoder-decoder is to be compiled.
    """
    choices = choices or Choices()
    if choices.compile and own.config.is_encoder_decoder:
        raise InputError("--compile is only for models without an encoder: leave it out")
    models = Competitors.of(own, extractor)
    states, prompts = text_of(models)
    models = replace(models, prompts=prompts)
    decoding = Decoding(models, choices.rounds)
    timed = {"e2e": _rates(decoding.greedy()), "sampling": _rates(decoding.sampling())}
    for name, does_sample in (("e2e_compiled", False), ("sampling_compiled", True)):
        timed[name] = _rates(decoding.compiled(does_sample) if choices.compile else {})
    heads, rounds = Heads(models, states, choices.without), choices.rounds * HEAD_ROUNDS_PER_ROUND
    timed["head"] = _times(heads.one_position(decoding.stats, rounds, choices.compile))
    timed["prompt"] = _Timed(heads.prompt(choices.rounds), "ms")
    batches = {str(size): (_times(heads.batch(size, rounds)), _rates(decoding.batch(size))) for size in choices.batches}
    stats = decoding.stats
    return {
        **_circumstances(models, own),
        **{name: timed[name].metrics() for name in RESULTS},
        "batches": {size: {**head.metrics(), **e2e.metrics()} for size, (head, e2e) in batches.items()},
        "ratios": {
            **{name: one.ratios() for name, one in timed.items()},
            "batches": {size: {"head": head.ratios(), "e2e": e2e.ratios()} for size, (head, e2e) in batches.items()},
        },
        "lossless": {
            "dense_passes_per_token": stats.dense_passes_per_token,
            "forward_passes_per_token": stats.forward_passes_per_token,
            "acceptance": stats.acceptance,
        },
        "tail_share": heads.tail_share(),
        "auto_sparse_up_to": heads.auto_sparse_up_to(),
        "added_memory_share": own.head.added_bytes() / own.head.dense_bytes(),
        "step_overhead_ms": {name: 1000 * seconds for name, seconds in step_overheads().items()},
        "spread": {
            **{name: one.quartiles() for name, one in timed.items()},
            "batches": {size: {**head.quartiles(), **e2e.quartiles()} for size, (head, e2e) in batches.items()},
        },
    }


@dataclass(frozen=True)
class _Timed:
    """Spreads by name, in seconds per call or tokens/s."""

    spreads: dict[str, Spread]
    unit: str
    names: tuple[str, ...] = ()  # null in the results if not measured

    @property
    def _is_time(self) -> bool:
        return self.unit == "ms"

    @property
    def _scale(self) -> float:
        return 1000 if self._is_time else 1

    def metrics(self) -> Metrics:
        measured = {f"{name}_{self.unit}": self._scale * spread.median for name, spread in self.spreads.items()}
        return {f"{name}_{self.unit}": None for name in self.names} | measured

    def quartiles(self) -> Metrics:
        return {
            f"{name}_{self.unit}": [self._scale * spread.low, self._scale * spread.high]
            for name, spread in self.spreads.items()
        }

    def ratios(self) -> Metrics:
        ours = [name for name in self.spreads if name.startswith(OURS)]
        ratios: Metrics = {
            f"{name}_over_{other}": self._ratio(name, other)
            for name in ours
            for other in OTHERS_OF.get(name, OTHERS)
            if other in self.spreads
        }
        if "no_head" in self.spreads:
            ratios |= {f"{name}_share_of_ceiling": self._ratio(name, "no_head") for name in ours}
            ratios["ceiling_over_dense"] = self._ratio("no_head", "dense")
        return ratios

    def _ratio(self, one: str, other: str) -> float:
        """The speed of one relative to the other."""
        ratio = self.spreads[one].median / self.spreads[other].median
        return 1 / ratio if self._is_time else ratio


def _times(spreads: dict[str, Spread]) -> _Timed:
    return _Timed(spreads, "ms", ("dense", *BASELINES))


def _rates(spreads: dict[str, Spread]) -> _Timed:
    return _Timed(spreads, "tok_s")


def _circumstances(models: Competitors, own: TopKExpertsForCausalLM) -> Metrics:
    head = own.head
    return {
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(own.dtype).removeprefix("torch."),
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "sizes": {
            "parameters": models.dense.num_parameters(),
            "vocab_size": head.out_features,
            "hidden_size": head.in_features,
            "num_experts": head.num_experts,
            "expert_size": head.expert_size,
            "num_experts_per_tok": head.num_experts_per_tok,
            "num_rescored": head.num_rescored if head.screens else head.num_experts_per_tok * head.expert_size,
            "num_always_on": head.num_always_on,
        },
    }


def _machine() -> str:
    """The name of the CPU, as far as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}"


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            yield package, version(package)
