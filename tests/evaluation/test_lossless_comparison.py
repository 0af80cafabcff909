"""Lossless against dense decoding: differing tokens are counted, and ties are told apart."""

import pytest
import torch
from support.lossless import NEW_TOKENS, convert, draft_everywhere
from support.tiny_models import tiny_dense
from torch import Tensor
from transformers import GenerationConfig

from hf_topk import TopKExpertsForCausalLM
from hf_topk.evaluation import lossless_comparison as measured
from hf_topk.evaluation.lossless_comparison import compare_lossless, is_tie, prompts_of
from hf_topk.model import drafting
from hf_topk.windows import Window


@pytest.fixture(autouse=True)
def drafts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft everywhere, as the routers of tiny models are always unsure."""
    draft_everywhere(monkeypatch)


@pytest.fixture
def small() -> TopKExpertsForCausalLM:
    return convert(tiny_dense(tied=False))


def windows_of(first: int, end: int) -> list[Window]:
    """Windows of 16 consecutive token ids; the last one is shorter."""
    return [Window(0, tuple(range(start, min(start + 16, end)))) for start in range(first, end, 16)]


def accept_unseen(drafting_head: drafting.DraftingHead, hidden: Tensor) -> Tensor:
    """Replaces verification: a wrong implementation that returns sparse logits."""
    states = drafting_head._states
    states.append(drafting_head._head.sparse_logits(hidden.flatten(0, 1))[:, None])
    drafting_head.has_verified = len(states) == drafting_head.size
    return torch.cat(states, dim=1) if drafting_head.has_verified else states[-1]


def test_comparison_counts_what_differs(small: TopKExpertsForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(windows_of(2, 90), 5, length=16)
    assert [prompt[0] for prompt in prompts] == [2, 18, 34, 50, 66]
    same = compare_lossless(small, prompts, NEW_TOKENS, batch_size=2)
    assert same.tokens == same.identical == 5 * NEW_TOKENS
    assert same.stats.tokens == 3 * NEW_TOKENS
    monkeypatch.setattr(drafting.DraftingHead, "__call__", accept_unseen)
    other = compare_lossless(small, prompts, NEW_TOKENS, batch_size=2)
    assert 0 < other.differing <= 5
    assert other.ties == 0
    assert other.identical + other.differing == other.tokens < same.tokens
    assert small.head_mode == "auto"


def test_comparison_uses_the_scores_after_logits_processors(
    small: TopKExpertsForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[float, float]] = []

    def note(best: float, other: float, dtype: torch.dtype) -> bool:
        judged.append((best, other))
        return is_tie(best, other, dtype)

    monkeypatch.setattr(measured, "is_tie", note)
    monkeypatch.setattr(drafting.DraftingHead, "__call__", accept_unseen)
    monkeypatch.setattr(small, "generation_config", GenerationConfig(repetition_penalty=3.0))
    prompts = prompts_of(windows_of(2, 90), 5, length=16)
    compared = compare_lossless(small, prompts, NEW_TOKENS)
    assert compared.differing == len(judged) > 0
    assert compared.ties == 0
    assert all(best > other for best, other in judged)  # which raw logits are not


def test_in_bfloat16_only_ties_differ(small: TopKExpertsForCausalLM) -> None:
    prompts = prompts_of(windows_of(2, 98), 6, length=16)
    compared = compare_lossless(small.to(torch.bfloat16), prompts, NEW_TOKENS, batch_size=2)
    assert compared.dtype == torch.bfloat16
    assert compared.differing == compared.ties < compared.identical
    assert 0 < compared.stats.accepted < compared.stats.drafted


def test_ties_are_one_step_of_the_type_apart() -> None:
    step = 2.0**-7  # of bfloat16 from 1 to 2
    assert is_tie(1.5, 1.5 - step, torch.bfloat16)
    assert not is_tie(1.5, 1.5 - 2 * step, torch.bfloat16)
    assert not is_tie(1.5, 1.5 - step, torch.float32)
    # Below a power of two the steps are half as long.
    assert is_tie(2.0, 2.0 - step, torch.bfloat16)
    assert not is_tie(2.0, 2.0 - 2 * step, torch.bfloat16)
    assert is_tie(-2.0, -2.0 - 2 * step, torch.bfloat16)
    assert not is_tie(-2.0, -2.0 - 4 * step, torch.bfloat16)
    assert not is_tie(2.0, -torch.inf, torch.bfloat16)
