"""Sampling, log-probabilities, penalties and grammars are vLLM's own, on logits of the whole vocabulary."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.vllm_engine import OPTIONS, PROMPTS, end, tokens_of
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from hf_topk import TopKExpertsForCausalLM


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Any]:
    """One engine for all of these tests."""
    started = LLM(str(folder), **OPTIONS, max_logprobs=-1)
    yield started
    end(started)


@pytest.fixture
def loaded(folder: Path) -> TopKExpertsForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_logprobs_are_those_of_the_sparse_head(engine: Any, loaded: TopKExpertsForCausalLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, prompt_logprobs=-1)
    for prompt in PROMPTS:
        [answer] = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        with torch.no_grad():
            expected = loaded(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
        found = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
        assert all(len(some) == 100 for some in found)
        got = torch.tensor([[some[token].logprob for token in range(100)] for some in found])
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def test_sampling_with_a_seed_is_repeatable_and_follows_the_sparse_probabilities(
    engine: Any, loaded: TopKExpertsForCausalLM
) -> None:
    draws = 500
    params = SamplingParams(temperature=1.0, max_tokens=1, n=draws, seed=7)
    runs = [engine.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)[0] for _ in range(2)]
    first, second = ([output.token_ids[0] for output in run.outputs] for run in runs)
    assert first == second
    with torch.no_grad():
        expected = loaded(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(dim=-1)
    counts = torch.bincount(torch.tensor(first), minlength=100) / draws
    assert (counts - expected).abs().max() < 5 / math.sqrt(draws) / 2


def test_processors_of_vllm_work_on_all_tokens(engine: Any) -> None:
    plain = tokens_of(engine)
    allowed = tokens_of(engine, SamplingParams(temperature=0, max_tokens=8, allowed_token_ids=[3, 4, 80]))
    assert {token for tokens in allowed for token in tokens} <= {3, 4, 80}
    biased = tokens_of(engine, SamplingParams(temperature=0, max_tokens=8, logit_bias={plain[0][0]: -100}))
    assert plain[0][0] not in biased[0]
    punished = SamplingParams(
        temperature=0, max_tokens=8, presence_penalty=2, frequency_penalty=2, repetition_penalty=5
    )
    assert tokens_of(engine, punished) != [tokens[:8] for tokens in plain]
    several = SamplingParams(temperature=1, max_tokens=8, n=4, top_p=0.9, top_k=20, min_p=0.01, seed=1)
    [answer] = engine.generate([{"prompt_token_ids": PROMPTS[1]}], several, use_tqdm=False)
    assert len(answer.outputs) == 4


def test_structured_output(engine: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    for temperature in (0, 1):
        params = SamplingParams(
            temperature=temperature,
            max_tokens=50,
            seed=3,
            structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=True),
        )
        [answer] = engine.generate("a", params, use_tqdm=False)
        found = json.loads(answer.outputs[0].text)
        assert found["a"] in ("x", "y")
        assert isinstance(found["b"], bool)
