"""The dense model in a converted one: its class, its parts, and its quantisation."""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from .configuration_topk_experts import TopKExpertsConfig
from .errors import InputError
from .own_generate import OwnGenerateMixin

# Class attributes that Transformers reads before the model is built; the wrapper has the dense class's values.
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


def dense_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find the class of a dense model.

    Args:
        config: its configuration.

    Returns:
        The class named in the configuration, if it generates text, from text, images or speech (with an encoder, not
        from images); otherwise the class that AutoModelForCausalLM loads (not with an encoder), or else
        AutoModelForSeq2SeqLM or AutoModelForSpeechSeq2Seq.

    Raises:
        InputError: when there is none.
    """
    is_supported = _is_seq2seq_class if config.is_encoder_decoder else generates_text
    named = next(filter(is_supported, config.architectures or ()), None)
    if named is not None:
        return cast(type[PreTrainedModel], getattr(transformers, named))
    mappings = [MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING]
    if not config.is_encoder_decoder:
        mappings.insert(0, MODEL_FOR_CAUSAL_LM_MAPPING)
    for mapping in mappings:
        if type(config) in mapping:
            return cast(type[PreTrainedModel], _as_tuple(mapping[type(config)])[0])
    raise InputError(
        f"Transformers has no causal language model for model type '{config.model_type}': "
        "choose one that AutoModelForCausalLM, AutoModelForSeq2SeqLM or AutoModelForSpeechSeq2Seq can load"
    )


def generates_text(name: str) -> bool:
    """Whether this is the name of a class in Transformers that generates text, from text, images or speech."""
    tables = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return any(map(partial(_names, name), tables)) or _is_seq2seq_class(name)


def _is_seq2seq_class(name: str) -> bool:
    """Whether this is the name of an encoder-decoder's class, for text or speech."""
    return is_translation_class(name) or is_speech_class(name)


def is_translation_class(name: str) -> bool:
    """Whether this is the name of a class that AutoModelForSeq2SeqLM loads."""
    return _names(name, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def is_speech_class(name: str) -> bool:
    """Whether this is the name of a class that AutoModelForSpeechSeq2Seq loads."""
    return _names(name, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)


def _names(name: str, table: Mapping[str, Any]) -> bool:
    return any(name in _as_tuple(entry) for entry in table.values())


def takes_images(dense: PreTrainedModel) -> bool:
    """Whether a dense model takes images as well as text, and AutoModelForImageTextToText loads it."""
    return _names(type(dense).__name__, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _as_tuple(one_or_more: Any) -> tuple[Any, ...]:
    return one_or_more if isinstance(one_or_more, tuple) else (one_or_more,)


def config_for(dense_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration to build a class from: the text part of `config` if the class is text-only."""
    of_text = config.sub_configs.get("text_config")
    return config.get_text_config() if of_text is not None and dense_class.config_class is of_text else config


def random_dense_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A dense model with random weights.

    Args:
        config: its configuration.

    Raises:
        InputError: when Transformers has no class for it.
    """
    dense_class = dense_class_of(config)
    return dense_class._from_config(config_for(dense_class, config))


def name_of_head(dense: PreTrainedModel) -> str:
    """Find the module that computes logits over the vocabulary.

    Args:
        dense: a dense causal language model.

    Returns:
        The module's name in `dense`.

    Raises:
        InputError: when there is no such module, or it is not linear.
    """
    head = dense.get_output_embeddings()
    name = next((name for name, module in dense.named_modules() if module is head), None)
    if head is None or name is None:
        raise InputError(
            f"{type(dense).__name__} has no single vocabulary head to split into experts: "
            "choose a causal language model with an `lm_head`"
        )
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"the vocabulary head of {type(dense).__name__} is a {type(head).__name__}, not a plain linear layer: "
            "load the model unquantised, or choose another one"
        )
    return name


def generate_as(model: Any, dense: PreTrainedModel) -> None:
    """Give a converted model the steps of `generate` that the dense model's class overrides.

    Args:
        model: the converted model; its own overrides take precedence.
        dense: the dense model in it.
    """
    for name, default in vars(GenerationMixin).items():
        its_own = getattr(type(dense), name, default)
        is_same = its_own is getattr(GenerationMixin, name)
        is_ours = getattr(type(model), name) is not getattr(GenerationMixin, name)
        if not (name.startswith("__") or is_same or is_ours):
            setattr(model, name, getattr(dense, name))


class DensePartsMixin(OwnGenerateMixin):
    """Exposes the dense model's parts and steps of `generate` where Transformers and trainers look for them."""

    base: PreTrainedModel
    config: TopKExpertsConfig
    head_name: str

    def check_class(self, dense_class: type[PreTrainedModel]) -> None:
        """Refuse a dense model that needs another Auto class.

        Args:
            dense_class: its class.

        Raises:
            InputError: when it is loaded with another Auto class than this model.
        """
        name, auto_class = dense_class.__name__, cast(Any, self).auto_class
        right = "AutoModelForCausalLM"
        if self.config.dense_config.is_encoder_decoder:
            right = "AutoModelForSpeechSeq2Seq" if is_speech_class(name) else "AutoModelForSeq2SeqLM"
        if auto_class != right:
            raise InputError(f"the dense model is a {name}: load the converted model with {right}, not {auto_class}")

    def check_tied_ends(self) -> None:
        """Refuse adapters around tied head and input embeddings, which could not be merged.

        Raises:
            InputError: when the two are tied, and an adapter was put around one of them.
        """
        ends = (self.base.get_output_embeddings(), self.base.get_input_embeddings())
        if not any(hasattr(end, "base_layer") for end in ends):
            return
        head, embeddings = (getattr(end, "base_layer", end) for end in ends)
        if head.weight is embeddings.weight:
            raise InputError(
                "there is an adapter around the head or the input embeddings, which are tied in this model, so it "
                "cannot be merged: exclude both from the adapter's target modules"
            )

    @property
    def base_model(self) -> nn.Module:
        """The dense model without its head, for code that computes a loss from hidden states and the head's weight."""
        return self.base.base_model

    def get_input_embeddings(self) -> nn.Module:
        """The dense model's input embeddings."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The head with its experts, or the adapter around it."""
        return self.base.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """The dense model without its head."""
        return self.base.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the decoder, which is the dense model without its head."""
        self.base.set_decoder(decoder)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors by the names of `state_dict`, or by those in checkpoints, which are the dense model's.

        Args:
            state_dict: tensors by name.
            strict: whether missing and unexpected names are errors.
            assign: whether to assign the tensors themselves rather than copy their values.

        Returns:
            The missing and the unexpected names.

        Raises:
            InputError: when one router is packed and the other in floats.
        """
        own = cast(Any, super()).state_dict()
        renamed = {name if name in own else f"base.{name}": tensor for name, tensor in state_dict.items()}
        router = f"base.{self.head_name}.router"
        forms = ["in floats" if f"{router}.rows" in tensors else "packed" for tensors in (own, renamed)]
        if f"{router}.bias" in renamed and forms[0] != forms[1]:
            raise InputError(
                f"the router is {forms[0]} in the model and {forms[1]} in the checkpoint: load it inside "
                "`joint_training` if it was saved inside, and outside otherwise"
            )
        return cast(Any, super()).load_state_dict(renamed, strict=strict, assign=assign)

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # Transformers derives the kind of cache, and the argument for it, from the class name.
        return cast(Any, self.base)._prepare_cache_for_generation(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # Transformers derives the valid arguments from the signature of `forward`.
        cast(Any, self.base)._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        # Transformers checks `prepare_inputs_for_generation` for whether a prompt may be given as embeddings.
        return cast(Any, self.base)._prepare_model_inputs(*args, **kwargs)


MARKS = {"hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"}


def mark_as_quantised(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Let a model be saved as one whose decoder is quantised, if it is.

    Args:
        model: a converted model; changed.
        dense: the dense model in it.
    """
    for name in MARKS & vars(dense).keys():
        setattr(model, name, getattr(dense, name))
    if (how := getattr(dense.config, "quantization_config", None)) is not None:
        model.config.quantization_config = how
