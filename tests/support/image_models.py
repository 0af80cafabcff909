"""Tiny models that take images, each with a prompt that has one."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

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
    """A model with 4 tokens per image."""
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=IMAGE_TOKEN,
    )
    return _with_image(config, 4)


def tiny_gemma3() -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with 4 tokens per image, with bidirectional attention among them."""
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**TEXT, "sliding_window": 4},
        vision_config=VISION,
        tie_word_embeddings=False,  # tied, it would repeat one token
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=8,
        eoi_token_index=7,
    )
    dense, inputs = _with_image(config, 4)
    return dense, {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


def tiny_qwen2_vl() -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model whose position ids have three axes, which `generate` computes."""
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
    """A model with cross-attention to the image, which has no tokens; the KV cache has an entry per patch."""
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
            if name.endswith("gate") or "gate_" in name.rpartition(".")[2]:  # initially 0, which lets no image through
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
            if parameter.dim() == 2 and not parameter.any():  # initially 0 in Gemma 3, which lets no image through
                parameter.normal_(std=0.5)
    input_ids = torch.tensor([[5, 7, *[IMAGE_TOKEN] * tokens, 6, 17, 42]])
    return dense, {"input_ids": input_ids, "pixel_values": torch.randn(1, 3, 8, 8)}
