"""Models that look at images: converted as a whole, they write what the dense model does."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUICK, tiny_checkpoint, tiny_converted, tiny_text
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.hub_card import named

VOCAB_SIZE, IMAGE_TOKEN = 100, 9
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


@pytest.fixture(scope="module", params=[tiny_llava, tiny_gemma3, tiny_qwen2_vl])
def dense_and_inputs(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Any]]:
    return request.param()


def continuation(model: Any, inputs: dict[str, Any], **choices: Any) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, **choices).tolist()


@torch.no_grad()
def test_writes_about_an_image_as_the_dense_model_does(
    dense_and_inputs: tuple[PreTrainedModel, dict[str, Any]], tmp_path: Path
) -> None:
    dense, inputs = dense_and_inputs
    expected, text = dense(**inputs).logits, continuation(dense, inputs)
    tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse").save_pretrained(tmp_path)
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(model, TopKExpertsForCausalLM)
        assert not any(info.values())
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        assert continuation(model, inputs) == text
        model.head.num_experts_per_tok = 1
        assert continuation(model, inputs, lossless=True) == text
    config = AutoConfig.from_pretrained(tmp_path).text_config
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, config=config)
    assert type(again) is type(dense)
    assert again(**inputs).logits.equal(expected)


def test_the_image_is_looked_at(dense_and_inputs: tuple[PreTrainedModel, dict[str, Any]]) -> None:
    dense, inputs = dense_and_inputs
    model = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.allclose(model(**inputs).logits, model(**other).logits, atol=1e-2)


def test_the_card_says_what_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = tiny_llava()
    tiny_checkpoint(tmp_path / "model", dense)
    recipe = Recipe(text=str(tiny_text(tmp_path / "text.jsonl")), num_experts_per_tok=2, **QUICK)
    convert_checkpoint(str(tmp_path / "model"), tmp_path / "out", recipe)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "takes images as the dense model does" in card.text
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", named(card.text, "out"), re.DOTALL)
    found: dict[str, Any] = {}
    for number in (0, 2):  # the other one is for where there is no package
        exec(snippets[number].replace("64", "2"), found)
    assert isinstance(found["model"], TopKExpertsForCausalLM)
    assert type(found["dense"]) is type(dense)
