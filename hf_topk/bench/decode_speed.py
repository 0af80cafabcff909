"""Speed of decoding end to end, with `generate`."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompileConfig,
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ..model.configuration_topk_experts import HeadMode, TopKExpertsConfig
from ..model.lossless import LosslessStats
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..model.token_chooser import TokenChooser
from .competitors import Competitors, NoHead
from .prompts import Prompt
from .timing import Spread, TokenClock, interleaved

NEW_TOKENS = 32  # after the first one, whose time is that of the prefill
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}
OVERHEAD_ROUNDS = 2000
SCORE_FALL = 3.0  # nats

PROMPT_STATS = LosslessStats(
    tokens=-1, forward_passes=-1, dense_passes=-1
)  # subtracts the first token, which is not timed

Decoder = Callable[[Prompt], float]


def warpers() -> list[LogitsProcessor]:
    """The logits processors of `SAMPLING`."""
    return [TemperatureLogitsWarper(SAMPLING["temperature"]), TopPLogitsWarper(SAMPLING["top_p"])]


class Decoding:
    """Times decoding of the competitors, in tokens/s.

    Attributes:
        stats: of lossless decoding without the first token of each text, over all rounds.
    """

    def __init__(self, models: Competitors, rounds: int) -> None:
        """Prepare.

        Args:
            models: the competitors.
            rounds: of each comparison.
        """
        self._models, self._rounds = models, rounds
        self.stats = LosslessStats()

    def greedy(self) -> dict[str, Spread]:
        """Greedy decoding in eager mode, also lossless."""
        decoders = self._decoders("dense", "sparse", "no_head")
        decoders["lossless"] = self._counted(_decoder(self._models.sparse, lossless=True))
        return self._measure(decoders, "Decoding")

    def sampling(self) -> dict[str, Spread]:
        """Sampling with a temperature and top-p."""
        decoders = self._decoders("dense", "sparse", "no_head", **SAMPLING)
        return self._measure(decoders, "Sampling")

    def batch(self, size: int) -> dict[str, Spread]:
        """Greedy decoding of a batch, in head mode "auto"."""
        decoders = {"dense": _decoder(self._models.dense), "auto": _decoder(self._models.sparse, "auto")}
        return self._measure(decoders, f"Decoding a batch of {size}", size)

    def compiled(self, does_sample: bool = False, backend: str = "inductor") -> dict[str, Spread]:
        """Decoding compiled by `generate`, with a static KV cache.

        Args:
            does_sample: whether to sample with a temperature and top-p.
            backend: of `torch.compile`.
        """
        compile_config = CompileConfig(fullgraph=True, mode="default", backend=backend)
        compile_config._compile_all_devices = cast(Any, True)  # `generate` compiles only on accelerators otherwise
        choices: dict[str, Any] = {"cache_implementation": "static", "compile_config": compile_config}
        decoders = self._decoders("dense", "sparse", "no_head", **choices, **(SAMPLING if does_sample else {}))
        if not does_sample:
            decoders["lossless"] = _decoder(self._models.sparse, lossless=True, **choices)
        return self._measure(decoders, "Sampling, compiled" if does_sample else "Decoding, compiled")

    def _decoders(self, *names: str, **choices: Any) -> dict[str, Decoder]:
        return {name: _decoder(getattr(self._models, name), **choices) for name in names}

    def _measure(self, decoders: dict[str, Decoder], description: str, batch: int = 1) -> dict[str, Spread]:
        seeds = itertools.count()

        def fresh() -> Prompt:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(next(seeds))  # the same prompts in every comparison: lossless speed depends on them
                return self._models.prompts(batch)

        return interleaved(decoders, fresh, self._rounds, description, warm_up_rounds=1)

    def _counted(self, decoder: Decoder) -> Decoder:
        def run(prompt: Prompt) -> float:
            speed = decoder(prompt)
            if (stats := self._models.sparse.last_generation_stats) is not None:
                self.stats += stats + PROMPT_STATS
            return speed

        return run


def _decoder(model: Any, head_mode: HeadMode = "sparse", **choices: Any) -> Decoder:
    """A function that decodes from a prompt and returns tokens/s over all rows."""

    def run(prompt: Prompt) -> float:
        if isinstance(model, TopKExpertsForCausalLM):
            model.head_mode = head_mode
        clock = TokenClock()
        model.generate(**prompt.inputs, max_new_tokens=1 + NEW_TOKENS, streamer=clock, **choices)
        return prompt.rows / clock.seconds_per_token

    return run


def step_overheads(rounds: int = OVERHEAD_ROUNDS) -> dict[str, float]:
    """Measure the Python overhead of the converted model per decode step.

    A one-layer Llama, tiny enough that computation costs next to nothing, runs one position dense and converted.
    `wrapper` is the difference with a head of constant logits: the wrapper's own overhead. `sparse` is the difference
    with the sparse head, including the launch of its operations from Python.

    Args:
        rounds: steps of each model.

    Returns:
        The differences of the medians, in seconds.
    """
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, num_attention_heads=1))
    config = TopKExpertsConfig(
        text_config=dense.config,
        num_experts=15,
        expert_size=16,
        num_experts_per_tok=4,
        num_always_on=16,
        router_rank=48,  # uses the same kernel as real heads
        router_packed=True,
        tail_rank=48,
        num_rescored=32,  # of 64, so that there is a screen, as in most models
        head_mode="sparse",
    )
    wrapped = TopKExpertsForCausalLM.from_dense(dense, config)
    # The scores fall from expert to expert, so that a quick test rules the tail out, as in most text.
    wrapped.head.router.bias.copy_(torch.arange(0.0, -SCORE_FALL * config.num_experts, -SCORE_FALL))
    models = Competitors.of(wrapped)
    no_head = NoHead(256, torch.float32)

    chooser = TokenChooser(wrapped.head, (), does_sample=False, leaves_logits=True)

    def step(model: Any, replacement: Any = None, choose: Any = None) -> Callable[[Tensor], None]:
        def run(tokens: Tensor) -> None:
            with nullcontext() if replacement is None else wrapped.head.replaced_by(replacement):
                logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
            scores = logits[:, -1].to(copy=True, dtype=torch.float32)
            (scores if choose is None else choose(tokens, scores)).argmax(dim=-1)

        return run

    runs = {
        "no_head": step(models.no_head),
        "dense": step(models.dense),
        "wrapper": step(wrapped, no_head),
        "sparse": step(wrapped, chooser.logits, chooser),
    }
    spreads = interleaved(runs, lambda: torch.randint(256, (1, 1)), rounds, "Timing the wrapper")
    return {
        "wrapper": spreads["wrapper"].median - spreads["no_head"].median,
        "sparse": spreads["sparse"].median - spreads["dense"].median,
    }
