"""Decode steps that `generate` compiles: on a CPU the decoder alone, beside the head in eager mode."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig, PreTrainedModel


class CompiledDecoder:
    """Calls a model with its decoder compiled.

    Compiled in one graph with the decoder, the sparse head would compute logits of all tokens, and copy scattered rows
    with the compiler's loops, which are slower on a CPU than torch's own kernels.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, compile_config: CompileConfig) -> None:
        """Prepare; the first call compiles.

        Args:
            model: calls the decoder.
            decoder: a module of the model.
            compile_config: of the compilation.
        """
        self._model, self._decoder, self._config = model, decoder, compile_config
        self._before = decoder._compiled_call_impl  # not looked up in each call: threads may be within one
        self._compiled: Callable[..., Any] = torch.compile(decoder._call_impl, **compile_config.to_dict())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        self._decoder._compiled_call_impl = self._compiled
        try:
            return self._model(*args, **kwargs)
        finally:
            self._decoder._compiled_call_impl = self._before

    def is_of(self, model: nn.Module, decoder: nn.Module, compile_config: CompileConfig) -> bool:
        """Whether it was made of these; see [`__init__`]."""
        return self._model is model and self._decoder is decoder and self._config == compile_config

    def __reduce__(self) -> Any:
        """Copies of a model, and pickled ones, compile anew."""
        return type(None), ()


class CompiledDecoderMixin:
    """The function of a converted model that `generate` calls for decode steps where it compiles them."""

    base: PreTrainedModel
    _compiled_decoder: CompiledDecoder | None = None

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Any:
        """A function that runs this model compiled; on a CPU see [`CompiledDecoder`]."""
        model: Any = self
        decoder, compile_config = self.base.base_model, compile_config or model._default_compile_config()
        if not self._compiles_the_decoder_alone:
            return cast(Any, super()).get_compiled_call(compile_config)
        if self._compiled_decoder is None or not self._compiled_decoder.is_of(model, decoder, compile_config):
            self._compiled_decoder = CompiledDecoder(model, decoder, compile_config)
        return self._compiled_decoder

    def call_with_own_head(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> Any:
        """A function that runs this model with its head in eager mode; compiled where `generate` compiles, if possible.

        Args:
            model_kwargs: of the decode steps.
            generation_config: of the generation.
        """
        model: Any = self
        if self._compiles_the_decoder_alone and model._valid_auto_compile_criteria(model_kwargs, generation_config):
            return self.get_compiled_call(generation_config.compile_config)
        return model

    @property
    def _compiles_the_decoder_alone(self) -> bool:
        head: Any = cast(Any, self).head
        return head.weight.device.type == "cpu" and self.base.base_model is not self.base
