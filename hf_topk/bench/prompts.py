"""What the benchmark decodes from: beginnings of texts, random tokens, or for an encoder-decoder encoded sources."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..examples import SpeechSource, is_speech_model
from ..model.errors import InputError

PROMPT_LENGTH = 16  # tokens
SOURCES = 4  # encoded ones, of which each batch is a random choice
SECONDS_OF_SPEECH = 5


@dataclass(frozen=True)
class Prompt:
    """A batch to decode from.

    Attributes:
        rows: B, the batch size.
        inputs: arguments of `generate`.
    """

    rows: int
    inputs: dict[str, Any]


Prompts = Callable[[int], Prompt]  # from a batch size


@torch.inference_mode()
def random_prompts(model: PreTrainedModel, vocab_size: int, extractor: Any = None) -> Prompts:
    """Make random batches. Sources are encoded here, as decoding is measured without the encoder.

    Args:
        model: the dense model.
        vocab_size: V.
        extractor: the feature extractor of a speech model.

    Raises:
        InputError: when a speech model has none.
    """

    def tokens(rows: int) -> Prompt:
        return _of_tokens(torch.randint(vocab_size, (rows, PROMPT_LENGTH)).to(model.device))

    if not model.config.is_encoder_decoder:
        return tokens
    inputs = _random_speech(model, extractor) if is_speech_model(model.config) else tokens(SOURCES).inputs
    states: Tensor = cast(Any, model).get_encoder()(**inputs).last_hidden_state

    def sources(rows: int) -> Prompt:
        chosen = states[torch.randint(len(states), (rows,), device=states.device)]
        return Prompt(rows, {"encoder_outputs": BaseModelOutput(last_hidden_state=cast(Any, chosen))})

    return sources


def beginnings(texts: Tensor) -> Prompts:
    """Make batches of the beginnings of texts, [T, n] token ids, chosen at random."""

    def some(rows: int) -> Prompt:
        return _of_tokens(texts[torch.randint(len(texts), (rows,), device=texts.device), :PROMPT_LENGTH])

    return some


def _of_tokens(ids: Tensor) -> Prompt:
    return Prompt(len(ids), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _random_speech(model: PreTrainedModel, extractor: Any) -> dict[str, Tensor]:
    if extractor is None:
        raise InputError("speech needs a feature extractor, and the model has none: put its files in the folder")
    noise = np.random.default_rng(0).normal(size=(SOURCES, SECONDS_OF_SPEECH * extractor.sampling_rate))
    sources = [SpeechSource(row, extractor) for row in 0.1 * noise.astype(np.float32)]
    made = sources[0].together(sources)
    return {model.main_input_name: made[model.main_input_name].to(model.device, model.dtype)}
