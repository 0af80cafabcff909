"""Tiny random models of any type in Transformers, made from its configuration class."""

import dataclasses
import re
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 100
WIDTH, HEADS, KEY_VALUE_HEADS = 32, 4, 2
HEAD_WIDTH = WIDTH // HEADS
LAYERS, MOST_LAYERS = 2, 4
MOST_POSITIONS = 128
LARGEST_KEPT = 64  # integers up to this are kept, unless a pattern matches their names
LOGIT_DEVIATION = 2.0
END, PADDING, FIRST_OTHER_ID = 0, 1, 2
PROBE = torch.tensor([[75, 67, 92, 58, 73, 81], [99, 63, 64, 82, 77, 96]])  # ids of ordinary tokens
TOKEN_IDS = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PADDING}

# The limit of an integer field, by the first pattern that matches its name.
SIZES = (
    (r"max_position|n_positions|n_ctx|max_seq|seq_len|max_target|max_source|model_max_length", MOST_POSITIONS),
    (r"vocab|n_words|n_token", VOCAB_SIZE),
    (r"num_kv_shared_layers", 0),
    (r"offset|first_k_dense|num_dense_layers", 1),
    (r"layers$|n_layer$|num_layers_per_stack|depth$", LAYERS),
    (r"key_value_heads|kv_n_heads|num_kv_heads|num_query_groups|n_group|topk_group|mamba_n_?groups", KEY_VALUE_HEADS),
    (r"heads$|n_head$", HEADS),
    (r"head_dim|head_size|headdim|d_head|dim_head|d_kv|kv_channels|rotary_dim|query_pre_attn", HEAD_WIDTH),
    (r"num_local_experts|num_experts$|n_routed_experts|zero_expert_num", 4),
    (r"experts_per_tok|top_?k", 2),
    (r"period|interval|every_n", 2),
    (r"window|chunk|block_size", 8),
)
# Fields that a model needs although their default is None.
NEEDED: dict[str, Any] = {
    "head_dim": HEAD_WIDTH,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
FLAGS = {"causal": True, "is_decoder": True}  # some classes are encoders by default
# Values that a configuration class needs, also nested, and that its fields do not tell.
HINTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": LAYERS},
    "chameleon": {"vocabulary_map": {"<image>": FIRST_OTHER_ID, "IMGIMGAZ": FIRST_OTHER_ID + 1}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": KEY_VALUE_HEADS, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_text": {"head_dim": 2 * HEAD_WIDTH, "per_layer_config": {}},
    "emu3": {"vocabulary_map": {"<image>": FIRST_OTHER_ID, "<|extra_200|>": FIRST_OTHER_ID + 1}},
    "glm5_next_text": {"index_kpool": 2, "index_topk": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,  # a head of its projector has 64 dimensions
            "num_attention_heads": 1,
            "num_hidden_layers": LAYERS,
        },
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl_text": {"head_dim": HEAD_WIDTH},
    "mamba2": {"num_heads": 2 * HEADS},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_WIDTH,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "paddleocr_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "num_buckets": 2},
    "step3p5": {"sliding_window": 8},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Make a configuration of a model type with the smallest sizes.

    Args:
        model_type: its name in Transformers.

    Raises:
        Exception: whatever the configuration class raises if it rejects the sizes.
    """
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_smaller(config_class()))


@torch.no_grad()
def tiny_model(auto_class: Any, model_type: str) -> PreTrainedModel:
    """Make a random model of a type, with logits far enough apart to exceed rounding errors.

    Args:
        auto_class: one of Transformers' Auto classes of models.
        model_type: its name in Transformers.

    Raises:
        Exception: whatever Transformers raises if the model cannot be built, needs more inputs than text, or cannot
            generate.
    """
    torch.manual_seed(0)
    dense = auto_class.from_config(tiny_config(model_type)).eval()
    deviation = dense(input_ids=PROBE).logits.float().std()
    head = dense.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.weight.mul_(LOGIT_DEVIATION / deviation)
    dense.generate(PROBE, max_new_tokens=1, do_sample=False, pad_token_id=PADDING)
    return dense


def _smaller(default: PreTrainedConfig) -> dict[str, Any]:
    """Arguments for a tiny version of a configuration."""
    hints = HINTS.get(default.model_type, {})
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = [field for field in dataclasses.fields(default) if field.name not in inherited]
    alias = {own: name for name, own in default.attribute_map.items()}
    # Not through attributes: values that differ by layer cannot be read there.
    values = {
        field.name: vars(default).get(default.attribute_map.get(field.name, field.name), field.default)
        for field in fields
    }
    named = {alias.get(name, name): value for name, value in values.items()}
    depth = named.get("num_hidden_layers", named.get("num_layers"))
    kinds = {name: list(dict.fromkeys(value)) for name, value in values.items() if _is_of_layers(value, depth)}
    layers = max([LAYERS, *(min(MOST_LAYERS, len(kind)) for kind in kinds.values())])
    layers = hints.get("num_hidden_layers", layers)
    choices: dict[str, Any] = {}
    for number, field in enumerate(fields):
        name, value = alias.get(field.name, field.name), values[field.name]
        if isinstance(value, PreTrainedConfig):
            choices[field.name] = type(value)(**_smaller(value))
        elif field.name in kinds:  # every kind of layer, or the last ones if there are too many
            choices[field.name] = (kinds[field.name][:1] * layers + kinds[field.name])[-layers:]
        elif name == "rope_parameters" and "mrope_section" in default.ignore_keys_at_rope_validation:
            choices[field.name] = {**value, "mrope_section": _sections(value.get("partial_rotary_factor", 1.0))}
        elif isinstance(value, list | tuple) and len(value) == depth and isinstance(field.default, list | tuple):
            choices[field.name] = value[:layers]
        elif name in FLAGS:
            choices[field.name] = FLAGS[name]
        elif value is None and name in NEEDED:
            choices[field.name] = NEEDED[name]
        elif value is None and name == "layer_types":
            choices[field.name] = ["full_attention"] * layers
        elif re.search(r"_(id|index)$", name) and (_is_number(value) or isinstance(value, list)):
            choices[field.name] = TOKEN_IDS.get(name, FIRST_OTHER_ID + number % (VOCAB_SIZE // 2))
        elif name in ("num_hidden_layers", "num_layers"):
            choices[field.name] = layers
        elif name == "num_key_value_heads" and value == named.get("num_attention_heads"):
            choices[field.name] = HEADS
        elif _is_number(field.default):  # other fields are derived from these
            choices[field.name] = _smaller_number(name, field.default)
    return {**choices, **hints}


def _is_of_layers(value: Any, depth: Any) -> bool:
    """Whether a value is a list of layer types."""
    return isinstance(value, list | tuple) and len(value) == depth and isinstance(value[0], str)


def _sections(rotary_share: float) -> list[int]:
    """The rotary pairs of an attention head for each of the three axes of an image."""
    pairs = int(HEAD_WIDTH * rotary_share) // 2
    return [pairs // 3, pairs // 3, pairs - 2 * (pairs // 3)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _smaller_number(name: str, value: Any) -> int:
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return min(value, size)
    return value if value <= LARGEST_KEPT else WIDTH
