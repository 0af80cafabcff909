"""Models that look at images: converted as a whole, they write what the dense model does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_converted
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hf_topk import TopKExpertsForCausalLM, lossless

VOCAB_SIZE, IMAGE_TOKEN = 100, 9
NEW_TOKENS = 24
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def tiny_llava() -> tuple[PreTrainedModel, dict[str, Any]]:
    """Its images become 4 tokens each."""
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=IMAGE_TOKEN,
    )
    return _with_image(config, 4)


def tiny_gemma3() -> tuple[PreTrainedModel, dict[str, Any]]:
    """Its images become 4 tokens each, which attend to one another both ways."""
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**TEXT, "sliding_window": 4},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=8,
        eoi_token_index=7,
    )
    dense, inputs = _with_image(config, 4)
    return dense, {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


def tiny_qwen2_vl() -> tuple[PreTrainedModel, dict[str, Any]]:
    """Its positions have three axes, which `generate` finds out."""
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    config = AutoConfig.for_model(
        "qwen2_vl",
        text_config=text,
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        image_token_id=IMAGE_TOKEN,
        video_token_id=8,
        vision_start_token_id=7,
        vision_end_token_id=6,
    )
    dense, inputs = _with_image(config, 4)
    inputs["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    return dense, {**inputs, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def tiny_mllama() -> tuple[PreTrainedModel, dict[str, Any]]:
    """Its image is no tokens: a layer attends to it, and keeps as many states as it has patches."""
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    config = AutoConfig.for_model(
        "mllama",
        text_config={
            **text,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        vision_config={
            **VISION,
            "attention_heads": 2,
            "num_global_layers": 1,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
        },
        image_token_index=VOCAB_SIZE,
    )
    dense, inputs = _with_image(config, 1)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("gate") or "gate_" in name.rpartition(".")[2]:  # it lets nothing through at first, too
                parameter.fill_(1)
    ones = torch.ones(1, 1, dtype=torch.long)
    return dense, {
        "input_ids": inputs["input_ids"],
        "pixel_values": inputs["pixel_values"][None, None],
        "aspect_ratio_ids": ones,
        "aspect_ratio_mask": ones[None],
        "cross_attention_mask": torch.ones(*inputs["input_ids"].shape, 1, 1, dtype=torch.long),
    }


def _with_image(config: Any, tokens: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(0)
    dense = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        dense.get_output_embeddings().weight.mul_(20)
        for parameter in dense.parameters():
            if parameter.dim() == 2 and not parameter.any():  # Gemma 3 lets nothing of an image through at first
                parameter.normal_(std=0.5)
    input_ids = torch.tensor([[5, 7, *[IMAGE_TOKEN] * tokens, 6, 17, 42]])
    return dense, {"input_ids": input_ids, "pixel_values": torch.randn(1, 3, 8, 8)}


@pytest.fixture(scope="module", params=[tiny_llava, tiny_gemma3, tiny_qwen2_vl, tiny_mllama])
def dense_and_inputs(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Any]]:
    return request.param()


def continuation(model: Any, inputs: dict[str, Any], **choices: Any) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, **choices).tolist()


@torch.no_grad()
def test_writes_about_an_image_as_the_dense_model_does(
    dense_and_inputs: tuple[PreTrainedModel, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossless, "DOUBTFUL_SHARE", 1.0)
    dense, inputs = dense_and_inputs
    expected, text = dense(**inputs).logits, continuation(dense, inputs)
    tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse").save_pretrained(tmp_path)
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(model, TopKExpertsForCausalLM)
        assert not any(info.values())
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        assert continuation(model, inputs) == text
        model.head.num_experts_per_tok = 5
        assert continuation(model, inputs, lossless=True) == text
        assert 0 < model.last_generation_stats.accepted < model.last_generation_stats.drafted
    config = AutoConfig.from_pretrained(tmp_path).text_config
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, config=config)
    assert type(again) is type(dense)
    assert again(**inputs).logits.equal(expected)


def test_the_image_is_looked_at(dense_and_inputs: tuple[PreTrainedModel, dict[str, Any]]) -> None:
    dense, inputs = dense_and_inputs
    model = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.allclose(model(**inputs).logits, model(**other).logits, atol=1e-2)
