"""Compares lossless with dense decoding, token by token."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.configuration_topk_experts import HeadMode
from ..model.errors import InputError
from ..model.lossless import LosslessStats
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..progress import progress
from ..windows import Window

PROMPT_LENGTH = 32  # tokens
NEW_TOKENS = 64


@dataclass
class LosslessComparison:
    """Greedy tokens of lossless decoding against those of dense decoding.

    Rows are compared up to their first difference, after which the prefixes differ.

    Attributes:
        dtype: of the logits.
        tokens: tokens compared.
        identical: tokens that are the dense model's.
        ties: tokens that differ although their dense scores are equal or adjacent in the dtype: matrix products of
            several positions round differently than those of one.
        stats: of lossless decoding, over all batches.
    """

    dtype: torch.dtype = torch.float32
    tokens: int = 0
    identical: int = 0
    ties: int = 0
    stats: LosslessStats = field(default_factory=LosslessStats)

    @property
    def differing(self) -> int:
        """Tokens that are not the dense model's, including ties."""
        return self.tokens - self.identical

    @property
    def dense_passes_per_token(self) -> float:
        """Verification passes of the dense head per new token of each row in the batch."""
        return self.stats.dense_passes_per_token

    @property
    def forward_passes_per_token(self) -> float:
        """Forward passes of the decoder per new token of each row in the batch."""
        return self.stats.forward_passes_per_token

    @property
    def acceptance(self) -> float:
        """Share of the draft tokens that were accepted."""
        return self.stats.acceptance

    def metrics(self) -> dict[str, int | float]:
        """The metrics by their names in `hf-topk evaluate --json`."""
        return {
            "lossless_tokens": self.tokens,
            "lossless_identical": self.identical,
            "lossless_ties": self.ties,
            "lossless_differing": self.differing,
            "dense_passes_per_token": self.dense_passes_per_token,
            "forward_passes_per_token": self.forward_passes_per_token,
            "acceptance": self.acceptance,
        }

    def rows(self) -> dict[str, str]:
        """The metrics, as lines of a table."""
        return {
            "lossless": f"{self.identical:,} of {self.tokens:,} tokens identical to the dense model's, "
            f"{self.ties:,} ties, {self.differing - self.ties:,} others",
            "per token": f"{self.dense_passes_per_token:.3f} verification passes, "
            f"{self.forward_passes_per_token:.3f} forward passes of the decoder; "
            f"{self.acceptance:.1%} of the draft tokens accepted",
        }


def prompts_of(windows: list[Window], count: int, length: int = PROMPT_LENGTH) -> list[list[int]]:
    """Take evenly spaced windows as prompts.

    Args:
        windows: of a text, of `length` tokens.
        count: the most prompts.
        length: tokens in a prompt; shorter windows are ignored.

    Raises:
        InputError: when no window is long enough.
    """
    runs = [window.token_ids for window in windows if len(window.token_ids) == length]
    if not runs:
        raise InputError(f"the text is too short for a prompt of {length} tokens: give a longer one")
    count = min(count, len(runs))
    return [list(runs[number * len(runs) // count]) for number in range(count)]


@torch.inference_mode()
def compare_lossless(
    model: TopKExpertsForCausalLM, prompts: list[list[int]], new_tokens: int = NEW_TOKENS, batch_size: int = 1
) -> LosslessComparison:
    """Decode greedily from each prompt, dense and lossless, ignoring end-of-text tokens.

    Args:
        model: a converted model.
        prompts: token ids, all prompts of the same length.
        new_tokens: tokens to generate per prompt.
        batch_size: prompts per batch.
    """
    comparison = LosslessComparison(model.dtype)
    choices: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": new_tokens,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    batches = torch.tensor(prompts, device=model.device).split(batch_size)
    with progress("Comparing lossless decoding", len(prompts), "prompts") as advance:
        for batch in batches:
            with head_mode(model, "dense"):
                dense = model.generate(batch, **choices, return_dict_in_generate=True, output_scores=True)
            with head_mode(model, "sparse"):  # drafts even if that is slower on this machine
                ours = model.generate(batch, **choices, lossless=True)
            if model.last_generation_stats is not None:
                comparison.stats += model.last_generation_stats
            scores = torch.stack(dense.scores, dim=1)  # (B, new, V), after the logits processors
            written = (dense.sequences[:, batch.shape[1] :], ours[:, batch.shape[1] :])
            for row in zip(*written, scores, strict=True):
                _compare_row(comparison, *row)
            advance(len(batch))
    return comparison


@contextmanager
def head_mode(model: TopKExpertsForCausalLM, mode: HeadMode) -> Iterator[None]:
    """For a while, run a model's head in another mode.

    Args:
        model: a converted model.
        mode: the mode.
    """
    before = model.head_mode
    model.head_mode = mode
    try:
        yield
    finally:
        model.head_mode = before


def _compare_row(comparison: LosslessComparison, dense: Tensor, ours: Tensor, scores: Tensor) -> None:
    """Add a row: tokens of both, [new], and the scores of dense decoding, [new, V]."""
    same = int((dense == ours).int().cumprod(dim=0).sum())
    comparison.identical += same
    comparison.tokens += same
    if same < len(dense):
        comparison.tokens += 1
        chosen = scores[same, torch.stack([dense[same], ours[same]])]
        comparison.ties += is_tie(float(chosen[0]), float(chosen[1]), comparison.dtype)


def is_tie(best: float, other: float, dtype: torch.dtype) -> bool:
    """Whether two scores are equal or adjacent in a dtype.

    Args:
        best: the largest score.
        other: another one.
        dtype: that both are rounded to.
    """
    rounded = torch.tensor([best, other], dtype=dtype)
    return bool(rounded[1] >= rounded[0].nextafter(rounded.new_tensor(-torch.inf)))
