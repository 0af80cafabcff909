"""Compiled decoding: no graph break, no recompilation after warm-up, and the tokens of eager mode."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.lossless import draft_everywhere
from support.tiny_models import tiny_converted, tiny_dense
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_topk import TopKExpertsForCausalLM

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def converted(model_type: str = "llama", **choices: object) -> TopKExpertsForCausalLM:
    """A converted model with a screen and a packed router."""
    chosen = {"num_rescored": 5, "router_packed": True, "sparse_max_positions": 2, **choices}
    return tiny_converted(tiny_dense(model_type), **chosen)


def generate(model: TopKExpertsForCausalLM, **choices: object) -> torch.Tensor:
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None, **choices}
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)


def compiled_choices() -> dict[str, object]:
    """The choices with which `generate` compiles, with a fast backend."""
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config, "disable_compile": False}


@pytest.mark.parametrize(
    ("model_type", "choices"),
    [
        ("llama", {}),
        ("llama", {"num_rescored": 256}),
        ("llama", {"router_packed": False}),
        ("llama", {"combine": "learned"}),
        ("llama", {"sparse_max_positions": 1}),  # a batch of two takes the dense path
        ("gpt2", {}),
    ],
)
def test_generate_with_a_static_cache_compiles_once_and_without_a_break(
    model_type: str, choices: dict[str, object]
) -> None:
    model = converted(model_type=model_type, **choices)
    expected = generate(model)
    assert generate(model, **compiled_choices()).equal(expected)
    warm = dict(counters["stats"])
    assert warm["unique_graphs"] == 1
    assert generate(model, **compiled_choices()).equal(expected)
    assert counters["stats"]["unique_graphs"] == warm["unique_graphs"]
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]


def test_sampling_with_a_static_cache_compiles_once_and_draws_the_tokens_of_eager_mode() -> None:
    model, sampling = converted(), {"do_sample": True, "top_k": 0, "top_p": 0.9}
    torch.manual_seed(0)
    expected = generate(model, **sampling)
    for _ in range(2):
        torch.manual_seed(0)
        assert generate(model, **sampling, **compiled_choices()).equal(expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_on_a_cpu_generate_compiles_the_decoder_and_not_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scored = converted(), []
    score = model.head.score

    def watched(hidden: torch.Tensor) -> object:
        scored.append(torch.compiler.is_compiling())
        return score(hidden)

    monkeypatch.setattr(model.head, "score", watched)
    generate(model, **compiled_choices())
    assert scored.count(False) >= 11  # steps after prefill, as in eager mode: without logits of all tokens
    assert not any(scored)


def test_a_copy_of_a_model_compiles_its_own_decoder() -> None:
    model = converted()
    generate(model, **compiled_choices())
    assert model._compiled_decoder is not None
    twin = copy.deepcopy(model)
    assert twin._compiled_decoder is None
    with torch.no_grad():
        for parameter in twin.base.base_model.parameters():
            parameter.mul_(-0.5)
    assert generate(twin, **compiled_choices()).equal(generate(twin))
    other = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    first = model._compiled_decoder
    assert model.get_compiled_call(other) is not first
    assert model.get_compiled_call(other) is model.get_compiled_call(other)


@pytest.mark.parametrize("choices", [{}, {"num_rescored": 256}, {"router_packed": False}, {"combine": "learned"}])
def test_a_compiled_model_generates_the_tokens_of_eager_mode(choices: dict[str, object]) -> None:
    model = converted(**choices)
    expected, dense = generate(model), model.base.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert generate(model, cache_implementation="static").equal(expected)
    assert not counters["graph_break"]
    # Where something stands in for the head, compiled code steps aside.
    model.head_mode, lossless = "sparse", generate(model, lossless=True)
    model.head_mode = "dense"
    assert lossless.equal(generate(model))
    assert dense.shape == lossless.shape


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_lossless_decoding_compiles_the_decoder_once(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tokens of eager mode, though rejected draft tokens are cropped from the cache."""
    draft_everywhere(monkeypatch)
    model = converted(model_type)
    choices: dict[str, Any] = {"lossless": True, **compiled_choices()}
    choices["compile_config"].dynamic = None  # sliding windows count their tokens in Python
    expected = generate(model, lossless=True)
    for _ in range(2):
        before = counters["stats"]["unique_graphs"]
        assert generate(model, **choices).equal(expected)
    assert model._compiled_decoder is not None
    assert model.last_generation_stats.drafted > model.last_generation_stats.accepted
    assert counters["stats"]["unique_graphs"] == before > 0
    assert not counters["graph_break"]
