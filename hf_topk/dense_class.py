"""The class that a dense model is of, and what a converted model does as that class does."""

from typing import Any, cast

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .errors import InputError

# What Transformers asks a class before its parts exist; the wrapper answers as the dense model's class does.
ANSWERED_AS_THE_DENSE_CLASS = (
    "_can_compile_fullgraph",
    "_can_record_outputs",
    "_compatible_flash_implementations",
    "_is_stateful",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "input_modalities",
    "main_input_name",
    "supports_gradient_checkpointing",
)


def class_that_writes_text(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find the class of a dense model.

    Args:
        config: its configuration.

    Returns:
        The class that the configuration names, if it writes text, with or without images to look at; otherwise the one
        that AutoModelForCausalLM loads.

    Raises:
        InputError: when there is neither.
    """
    named = next(filter(writes_text, config.architectures or ()), None)
    if named is not None:
        return cast(type[PreTrainedModel], getattr(transformers, named))
    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise InputError(
            f"Transformers has no causal language model for model type '{config.model_type}': "
            "choose one that AutoModelForCausalLM can load"
        ) from None
    return cast(type[PreTrainedModel], _as_tuple(found)[0])


def writes_text(name: str) -> bool:
    """Whether a class of this name is one of Transformers' that write text, with or without images to look at."""
    tables = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return any(name in _as_tuple(entry) for table in tables for entry in table.values())


def looks_at_images(dense: PreTrainedModel) -> bool:
    """Whether a dense model takes images as well as text, so that AutoModelForImageTextToText is what loads it."""
    return any(
        type(dense).__name__ in _as_tuple(entry) for entry in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    )


def _as_tuple(one_or_more: Any) -> tuple[Any, ...]:
    return one_or_more if isinstance(one_or_more, tuple) else (one_or_more,)


def config_for(dense_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration that a class is made from: a part of `config` where the class is that of the text alone."""
    of_text = config.sub_configs.get("text_config")
    return config.get_text_config() if of_text is not None and dense_class.config_class is of_text else config


def random_dense_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A dense model whose weights are not yet loaded.

    Args:
        config: its configuration.

    Raises:
        InputError: when Transformers has no class for it.
    """
    dense_class = class_that_writes_text(config)
    return dense_class._from_config(config_for(dense_class, config))


def generate_as(model: Any, dense: PreTrainedModel) -> None:
    """Give a converted model those steps of `generate` that the dense model's class has of its own.

    Args:
        model: the converted model; what its own class defines stays.
        dense: the dense model in it.
    """
    for name, default in vars(GenerationMixin).items():
        its_own = getattr(type(dense), name, default)
        is_same = its_own is getattr(GenerationMixin, name)
        if not (name.startswith("__") or is_same or name in vars(type(model))):
            setattr(model, name, getattr(dense, name))
