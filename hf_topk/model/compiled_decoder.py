"""Decode steps that `generate` compiles: on a CPU the decoder alone, beside the head in eager mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig


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
        self._compiled: Callable[..., Any] = torch.compile(decoder._call_impl, **compile_config.to_dict())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        before, self._decoder._compiled_call_impl = self._decoder._compiled_call_impl, self._compiled
        try:
            return self._model(*args, **kwargs)
        finally:
            self._decoder._compiled_call_impl = before

    def is_of(self, model: nn.Module, decoder: nn.Module, compile_config: CompileConfig) -> bool:
        """Whether it was made of these; see [`__init__`]."""
        return self._model is model and self._decoder is decoder and self._config == compile_config

    def __reduce__(self) -> Any:
        """Copies of a model, and pickled ones, compile anew."""
        return type(None), ()
