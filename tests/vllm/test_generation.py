"""A converted model generates the same tokens in vLLM as in Transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.vllm_engine import LONGER, NEW_TOKENS, PROMPTS, head_of, save_converted, small_dense, tokens_of
from transformers import AutoModelForCausalLM


def expected_tokens(folder: Path, **settings: Any) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, value in settings.items():
        setattr(model, name, value)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    made = [model.generate(torch.tensor([prompt]), do_sample=False, **length)[0] for prompt in PROMPTS]
    return [tokens[len(prompt) :].tolist() for tokens, prompt in zip(made, PROMPTS, strict=True)]


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied": {"tied": False},
    "qwen2": {},  # whose head is the layer of input embeddings
    "gptj": {"tied": False, "bias": True, "rotary_dim": 16},
    "phi": {"tied": False, "bias": True},  # which vLLM runs with the class of Transformers
    "gemma2": {"head_dim": 32, "final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 3.0},
    "gpt_neox": {"tied": False},  # likewise; its head has another name
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, start: Callable[..., Any], name: str) -> None:
    dense = small_dense(name.partition("-")[0], **ARCHITECTURES[name])
    folder = save_converted(tmp_path, dense)
    expected = expected_tokens(folder)  # before vLLM, which changes classes of Transformers that it runs itself
    llm = start(folder)
    assert tokens_of(llm) == expected
    assert head_of(llm).counters.counts["hf_topk:sparse_steps"] >= NEW_TOKENS
    assert head_of(llm).counters.counts["hf_topk:dense_steps"] == 0


def test_all_experts_are_vllms_own_dense_model(
    folder: Path, dense_tokens: list[list[int]], start: Callable[..., Any]
) -> None:
    assert tokens_of(start(folder, hf_overrides={"num_experts_per_tok": 6}), LONGER) == dense_tokens
    assert expected_tokens(folder) != [tokens[:NEW_TOKENS] for tokens in dense_tokens]


def test_head_mode_dense_is_the_dense_model(
    folder: Path, dense_tokens: list[list[int]], start: Callable[..., Any]
) -> None:
    llm = start(folder, hf_overrides={"head_mode": "dense"})
    assert head_of(llm) is None
    assert tokens_of(llm, LONGER) == dense_tokens


@pytest.mark.parametrize("combine", ["router", "learned"])
def test_combinations(tmp_path: Path, start: Callable[..., Any], combine: str) -> None:
    folder = save_converted(tmp_path, combine=combine)
    assert tokens_of(start(folder)) == expected_tokens(folder)


def test_screened_tokens(tmp_path: Path, start: Callable[..., Any]) -> None:
    folder = save_converted(tmp_path, num_rescored=5)
    llm = start(folder)
    assert head_of(llm).head.screens
    assert tokens_of(llm) == expected_tokens(folder)


def test_auto_runs_sparse_up_to_a_number_of_positions(tmp_path: Path, start: Callable[..., Any]) -> None:
    llm = start(save_converted(tmp_path, head_mode="auto", sparse_max_positions=2))
    counts = head_of(llm).counters.counts
    tokens_of(llm, prompts=PROMPTS[:2])
    assert counts["hf_topk:sparse_steps"] >= NEW_TOKENS - 1
    before = dict(counts)
    tokens_of(llm)
    assert counts["hf_topk:dense_steps"] - before["hf_topk:dense_steps"] >= NEW_TOKENS - 1
    assert counts["hf_topk:sparse_steps"] - before["hf_topk:sparse_steps"] <= 1


def test_auto_is_measured_at_start(tmp_path: Path, start: Callable[..., Any]) -> None:
    llm = start(save_converted(tmp_path, head_mode="auto", sparse_max_positions=None))
    assert head_of(llm).most_positions in (0, 1, 2, 4, 8, 16, 32, 64)
