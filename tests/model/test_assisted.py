"""Assisted generation, stop strings, sliding windows and continuous batching."""

from typing import Any

import pytest
import torch
from support.tiny_models import character_tokenizer, tiny_converted, tiny_dense
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from hf_topk import InputError, TopKExpertsForCausalLM

PROMPT = torch.tensor([[5, 17, 42, 8, 23]])
CHOICES = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny_dense(tied=False)


@pytest.fixture(scope="module")
def partner() -> PreTrainedModel:
    """A smaller dense model with the same vocabulary."""
    return tiny_dense(tied=False, num_hidden_layers=1)


def convert(dense: PreTrainedModel, experts: int, **choices: Any) -> TopKExpertsForCausalLM:
    """A converted model; it is the dense model if all 6 experts are picked."""
    return tiny_converted(dense, **{"num_experts_per_tok": experts, "head_mode": "sparse", **choices})


def generate(model: Any, **choices: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(PROMPT, **{**CHOICES, **choices})


@pytest.mark.parametrize("experts", [1, 6])
def test_target_of_an_assistant(experts: int, dense: PreTrainedModel, partner: PreTrainedModel) -> None:
    """Greedy tokens are the target's own, for any draft tokens."""
    model = convert(dense, experts)
    assert generate(model, assistant_model=partner).equal(generate(model))
    if experts == 6:
        assert generate(model, assistant_model=partner).equal(generate(dense))
    assert generate(model, assistant_model=partner, lossless=True).equal(generate(dense))
    sampled = generate(model, assistant_model=partner, do_sample=True, top_k=0)
    assert sampled.shape == (1, 17)


@pytest.mark.parametrize("experts", [1, 6])
def test_assistant_of_a_target(experts: int, dense: PreTrainedModel, partner: PreTrainedModel) -> None:
    assert generate(dense, assistant_model=convert(partner, experts)).equal(generate(dense))
    assert generate(dense, assistant_model=convert(dense, experts)).equal(generate(dense))
    assert generate(dense, assistant_model=convert(partner, experts), do_sample=True, top_k=0).shape == (1, 17)


@pytest.mark.parametrize("choices", [{}, {"lossless": True}, {"num_beams": 3}], ids=["greedy", "lossless", "beams"])
def test_prompt_lookup_and_stop_strings(choices: dict[str, Any], dense: PreTrainedModel) -> None:
    tokenizer = character_tokenizer()
    free = generate(convert(dense, 6), **choices)[0, 5:]
    end = tokenizer.decode(free[3:5])
    stop = {"stop_strings": [end], "tokenizer": tokenizer}
    expected = generate(dense, **{name: value for name, value in choices.items() if name != "lossless"}, **stop)
    assert expected.shape[1] < 17
    assert tokenizer.decode(expected[0, 5:]).endswith(end)
    assert generate(convert(dense, 6), **choices, **stop).equal(expected)
    if choices.get("lossless"):
        assert generate(convert(dense, 1), **choices, **stop).equal(expected)
        assert generate(convert(dense, 1), **choices, prompt_lookup_num_tokens=3).equal(generate(dense))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_with_windows(cache: str) -> None:
    """With a prompt and continuation longer than the sliding window."""
    windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    dense = tiny_dense("gemma3_text", tied=False, **windows)
    expected = generate(dense, cache_implementation=cache)
    assert generate(convert(dense, 6), cache_implementation=cache).equal(expected)
    out = generate(convert(dense, 1), cache_implementation=cache, return_dict_in_generate=True, output_logits=True)
    assert all(logits.isfinite().all() for logits in out.logits)


@pytest.mark.parametrize("experts", [1, 6])
def test_continuous_batches(experts: int, dense: PreTrainedModel) -> None:
    model, prompts = convert(dense, experts), [[5, 17, 42, 8, 23], [99, 3, 64]]
    config = GenerationConfig(**{**CHOICES, "eos_token_id": -1})
    little = ContinuousBatchingConfig(num_blocks=4, block_size=32, max_batch_tokens=32)  # else most of the memory
    found = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=little, progress_bar=False, warmup=False
    )
    tokens = sorted(found[name].generated_tokens for name in found)
    alone = [model.generate(torch.tensor([prompt]), **CHOICES)[0, len(prompt) :].tolist() for prompt in prompts]
    assert tokens == sorted(alone)
    if experts == 6:
        assert generate(dense)[0, 5:].tolist() in tokens


def test_continuous_batches_are_not_lossless(dense: PreTrainedModel) -> None:
    model = convert(dense, 1)
    with pytest.raises(InputError, match="continuous batching is not lossless"):
        model.generate_batch([[5, 17]], generation_config=GenerationConfig(**CHOICES, lossless=True))
    model.generation_config.lossless = True
    with pytest.raises(InputError, match="generate without it, or set head_mode to 'dense'"):
        model.init_continuous_batching()
    model.head_mode = "dense"
    assert model.init_continuous_batching(GenerationConfig(**CHOICES)) is not None
