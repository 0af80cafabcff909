"""Vision-language models: their output is the dense model's."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from support.image_models import tiny_gemma3, tiny_llava, tiny_mllama, tiny_qwen2_vl
from support.lossless import draft_everywhere
from support.tiny_models import QUICK, tiny_checkpoint, tiny_converted, tiny_text, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    CLIPImageProcessorPil,
    Florence2Config,
    LlavaProcessor,
    PreTrainedModel,
    pipeline,
)

from hf_topk import InputError, TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.model.dense_model import dense_class_of
from hf_topk.model.hub_card import named

NEW_TOKENS = 24


@pytest.fixture(scope="module", params=[tiny_llava, tiny_gemma3, tiny_qwen2_vl, tiny_mllama])
def dense_and_inputs(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Any]]:
    return request.param()


def continuation(model: Any, inputs: dict[str, Any], **choices: Any) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, **choices).tolist()


@torch.no_grad()
def test_text_about_an_image_is_the_dense_model_s(
    dense_and_inputs: tuple[PreTrainedModel, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_everywhere(monkeypatch)
    dense, inputs = dense_and_inputs
    expected, text = dense(**inputs).logits, continuation(dense, inputs)
    tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse").save_pretrained(tmp_path)
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
        model, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(model, TopKExpertsForCausalLM)
        assert not any(info.values())
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        assert continuation(model, inputs) == text
        model.head.num_experts_per_tok = 3
        assert continuation(model, inputs, lossless=True) == text
        assert 0 < model.last_generation_stats.accepted < model.last_generation_stats.drafted
    config = AutoConfig.from_pretrained(tmp_path).text_config
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, config=config)
    assert type(again) is type(dense)
    assert again(**inputs).logits.equal(expected)


def test_the_output_depends_on_the_image(dense_and_inputs: tuple[PreTrainedModel, dict[str, Any]]) -> None:
    dense, inputs = dense_and_inputs
    model = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.allclose(model(**inputs).logits, model(**other).logits, atol=1e-2)


def test_the_card_names_the_auto_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = tiny_llava()
    tiny_checkpoint(tmp_path / "model", dense)
    recipe = Recipe(text=str(tiny_text(tmp_path / "text.jsonl")), num_experts_per_tok=2, **QUICK)
    convert_checkpoint(str(tmp_path / "model"), tmp_path / "out", recipe)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "takes the dense model's image inputs" in card.text
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", named(card.text, "out"), re.DOTALL)
    found: dict[str, Any] = {}
    for number in (0, 2):  # the other one is for where there is no package
        exec(snippets[number].replace("64", "2"), found)
    assert isinstance(found["model"], TopKExpertsForCausalLM)
    assert type(found["dense"]) is type(dense)


def test_pipelines(tmp_path: Path) -> None:
    """Pipelines load a model with their own Auto class."""
    image = pytest.importorskip("PIL.Image").new("RGB", (8, 8), (200, 10, 30))
    dense, _ = tiny_llava()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w7"], special_tokens=True)
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(
        image_processor, tokenizer, 4, "default", image_token="w7", num_additional_image_tokens=1
    )

    def written(model: Any, **choices: Any) -> str:
        about_images = pipeline("image-text-to-text", model=model, **choices)
        return about_images(images=image, text="w7 w40 w3", max_new_tokens=6)[0]["generated_text"]

    converted = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    expected = written(dense, processor=processor)
    assert len(expected.split()) == 9
    assert written(converted, processor=processor) == expected
    converted.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert written(str(tmp_path)) == expected
    plain = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)("w40 w3", max_new_tokens=6, do_sample=False)
        for model in (dense, converted, str(tmp_path))
    ]
    assert plain[0] == plain[1] == plain[2]


def test_encoder_decoders_that_read_images_are_refused() -> None:
    config = Florence2Config(architectures=["Florence2ForConditionalGeneration"])
    with pytest.raises(InputError, match="no causal language model for model type 'florence2'"):
        dense_class_of(config)
