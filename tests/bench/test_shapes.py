"""Published shapes with random weights, and their conversion at random."""

import pytest
import torch
from support.tiny_models import TINY_SHAPE
from torch import nn
from torch.nn import functional as F

from hf_topk.bench.random_experts import (
    NUM_RESCORED,
    SHARE_OF_EXPERTS,
    config_at_random,
    convert_at_random,
    random_states,
)
from hf_topk.bench.shapes import SHAPES, random_model, shape_config
from hf_topk.convert import Recipe
from hf_topk.convert.steps.choose_ranks import default_ranks
from hf_topk.model.dense_model import random_dense_model
from hf_topk.model.errors import InputError
from hf_topk.model.head import TopKExpertsHead

PARAMETERS = {
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "qwen2.5-0.5b": 494_032_768,
    "smollm2-135m": 134_515_008,
    "whisper-base": 72_593_920,
    "whisper-tiny": 37_760_640,
}


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SHAPES, "tiny", TINY_SHAPE)
    return "tiny"


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_the_published_parameter_counts(shape: str) -> None:
    with torch.device("meta"):
        model = random_dense_model(shape_config(shape))
    assert model.num_parameters() == PARAMETERS[shape]


@pytest.mark.parametrize(
    ("shape", "heads", "head_width", "epsilon", "theta", "positions"),
    [
        ("gemma-3-270m", (4, 1), 256, 1e-6, 1_000_000, 32768),
        ("gemma-3-1b", (4, 1), 256, 1e-6, 1_000_000, 32768),
        ("llama-3.2-1b", (32, 8), 64, 1e-5, 500_000, 131_072),
        ("qwen3-0.6b", (16, 8), 128, 1e-6, 1_000_000, 40_960),
        ("qwen2.5-0.5b", (14, 2), 64, 1e-6, 1_000_000, 32_768),
        ("smollm2-135m", (9, 3), 64, 1e-5, 100_000, 8192),
    ],
)
def test_shapes_have_the_published_settings(
    shape: str, heads: tuple[int, int], head_width: int, epsilon: float, theta: float, positions: int
) -> None:
    config = shape_config(shape)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    assert (config.num_attention_heads, config.num_key_value_heads) == heads
    assert (getattr(config, "head_dim", None) or config.hidden_size // heads[0]) == head_width
    assert (config.rms_norm_eps, rope["rope_theta"]) == (epsilon, theta)
    assert config.max_position_embeddings == positions


@pytest.mark.parametrize("shape", SHAPES)
def test_added_and_read_bytes_of_a_default_conversion(shape: str) -> None:
    config = config_at_random(shape_config(shape))
    with torch.device("meta"):
        head = TopKExpertsHead(nn.Linear(config.text_config.hidden_size, config.vocab_size, bias=False), config)
    head.bfloat16()
    is_narrow = head.in_features < 576  # of whose rows router and screen are a larger share
    assert head.added_bytes() <= head.dense_bytes() / (6 if is_narrow else 9)
    assert head.bytes_read() <= head.dense_bytes() / (18 if is_narrow else 20)


def test_gemma_attends_to_all_in_one_layer_of_six() -> None:
    for shape, layers in (("gemma-3-270m", 18), ("gemma-3-1b", 26)):
        config = shape_config(shape)
        full = [number for number, kind in enumerate(config.layer_types) if kind == "full_attention"]
        assert full == list(range(5, layers, 6))
        assert config.sliding_window == 512


def test_refuses_an_unknown_shape() -> None:
    with pytest.raises(InputError, match=r"unknown shape 'gpt-5': choose one of gemma-3-270m"):
        shape_config("gpt-5")


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen2"])
def test_random_model_is_tied_and_finite(model_type: str, tiny_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, tiny_shape, {**TINY_SHAPE, "model_type": model_type})
    model = random_model(tiny_shape, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = torch.randn(1, 1, 32).bfloat16()
    torch.testing.assert_close(model.model.norm(state).float(), F.rms_norm(state.float(), (32,)), atol=0.05, rtol=0)
    logits = [model(input_ids=torch.tensor([[token]])).logits for token in (5, 6)]
    assert logits[0].isfinite().all()
    assert not torch.equal(*logits)


# A conversion at random


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_random_conversion_is_complete_and_shares_the_weights(
    model_type: str, tiny_shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, tiny_shape, {**TINY_SHAPE, "model_type": model_type})
    dense = random_model(tiny_shape, torch.float32)
    head = convert_at_random(dense).head
    assert head.weight is dense.get_output_embeddings().weight
    assert torch.cat([head.always_on_ids, head.expert_ids.flatten()]).sort().values.tolist() == list(range(20_000))
    assert head.router.rows is None


@pytest.mark.parametrize("shape", ["smollm2-135m", "gemma-3-270m"])
def test_a_random_conversion_has_the_default_sizes(shape: str) -> None:
    config = config_at_random(shape_config(shape))
    recipe = Recipe().resolve(config.vocab_size)
    for name in ("expert_size", "num_always_on"):
        assert getattr(config, name) == getattr(recipe, name)
    assert default_ranks(recipe) == (config.router_rank, config.tail_rank)
    assert config.router_packed
    assert config.num_experts == recipe.num_experts
    assert config.num_experts_per_tok == round(SHARE_OF_EXPERTS * config.num_experts)
    assert config.num_rescored == NUM_RESCORED < config.num_experts_per_tok * config.expert_size


def test_all_tokens_of_few_experts_are_rescored(tiny_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, tiny_shape, {**TINY_SHAPE, "vocab_size": 1000})
    config = config_at_random(shape_config(tiny_shape))
    assert config.num_rescored == config.num_experts_per_tok * config.expert_size < NUM_RESCORED
    assert TopKExpertsHead(nn.Linear(32, 1000, bias=False), config).screens is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_scores_and_screens_have_their_standard_deviations(dtype: torch.dtype, tiny_shape: str) -> None:
    head = convert_at_random(random_model(tiny_shape, dtype)).head
    states = random_states(head)
    assert head.router(states).std(dim=-1).mean() == pytest.approx(1.0, abs=0.15)
    picked = head.pick(states)
    assert head.tail.screen(states, picked.experts).std(dim=-1).mean() == pytest.approx(0.5, abs=0.1)
    one, other = (set(some.tolist()) for some in picked.experts[:2])
    assert len(one & other) < 0.5 * len(one)
    one, other = (set(some.tolist()) for some in head.score(states[:2]).ids)
    assert len(one & other) < 0.5 * len(one)
