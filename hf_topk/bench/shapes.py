"""Shapes of published models, built offline with random weights.

The hyper-parameters are those of the models' published config.json files (google/gemma-3-270m and -1b-pt,
meta-llama/Llama-3.2-1B, Qwen/Qwen3-0.6B, Qwen/Qwen2.5-0.5B, HuggingFaceTB/SmolLM2-135M, openai/whisper-base and -tiny).
All of them tie the head to the input embeddings.
"""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..model.dense_model import dense_class_of
from ..model.errors import InputError
from ..progress import progress

_GEMMA_3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,  # in five layers of six
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}


def _whisper(width: int, layers: int) -> dict[str, Any]:
    sides = ("encoder", "decoder")
    return {
        "model_type": "whisper",
        "vocab_size": 51865,
        "d_model": width,
        **{f"{side}_layers": layers for side in sides},
        **{f"{side}_attention_heads": width // 64 for side in sides},
        **{f"{side}_ffn_dim": 4 * width for side in sides},
    }


SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3-270m": {**_GEMMA_3, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "gemma-3-1b": {**_GEMMA_3, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    },
    "whisper-base": _whisper(512, 6),
    "whisper-tiny": _whisper(384, 4),
}

WEIGHT_STD = 0.02


def shape_config(shape: str) -> PreTrainedConfig:
    """The configuration of a published model's shape.

    Args:
        shape: one of `SHAPES`.

    Raises:
        InputError: when it is not.
    """
    if shape not in SHAPES:
        raise InputError(f"unknown shape '{shape}': choose one of {', '.join(SHAPES)}")
    return AutoConfig.for_model(**SHAPES[shape], tie_word_embeddings=True)


@torch.no_grad()
def random_model(shape: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Make a dense model of a published shape, with random matrices, and norms and biases as before training.

    It is allocated in `dtype`, without a copy in fp32.

    Args:
        shape: one of `SHAPES`.
        dtype: of all weights.
        seed: of the weights.

    Raises:
        InputError: when there is no such shape.
    """
    config = shape_config(shape)
    with init.no_init_weights():
        model = dense_class_of(config)._from_config(config, dtype=dtype)
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    named = list(model.named_parameters())
    with progress(f"Making random weights of {shape}", len(named), "tensors") as advance:
        for name, parameter in named:
            if parameter.dim() > 1:
                parameter.normal_(std=WEIGHT_STD, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else norm_weight(model, 1.0))
            advance()
    return model.eval()


def norm_weight(model: PreTrainedModel, factor: float) -> float:
    """The norm weight that scales by `factor`: Gemma's norms multiply by 1 + weight."""
    return factor - 1.0 if model.config.model_type.startswith("gemma") else factor
