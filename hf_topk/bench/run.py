"""`hf-topk bench`: checks the arguments first, then measures."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from ..examples import is_speech_model
from ..loading import DTYPES, find_device, load_converted
from ..model.errors import InputError
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from .competitors import Competitors, sampled_text
from .plot import check_plot, write_plot
from .prompts import Prompts
from .quantised_decoder import check_decoder_format, quantise_decoder
from .random_experts import convert_at_random, random_states
from .shapes import random_model, shape_config
from .suite import Choices, bench

TEXTS, POSITIONS = 32, 512


def run_bench(
    directory: str | None,
    shape: str | None,
    choices: Choices,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    decoder_format: str | None = None,
    threads: int | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Measure a converted model, or a published shape with random weights.

    The head is timed on hidden states of text that the dense model writes, and decoding continues beginnings of such
    texts. With random weights both are random.

    Args:
        directory: a converted model; None with a shape.
        shape: one of `SHAPES`; None with a directory.
        choices: what to measure.
        dtype: "float32", "bfloat16", or "auto": as the model is stored, bfloat16 with a shape.
        device: such as "cpu" or "cuda:0", or "auto": the accelerator, if any.
        decoder_format: "int8" or "int4" to quantise the linear layers of the decoder; None to leave them alone.
        threads: that torch uses from now on; None for its own choice.
        plot: a file to plot the results to.

    Returns:
        The metrics of [`bench`], with `shape`, the name of the model or shape, and `body`, the decoder format.

    Raises:
        InputError: when there is neither a directory nor a shape, or both, or a choice is not available.
    """
    if (directory is None) == (shape is None):
        raise InputError("give either a converted model's folder, or --shape with a published model's name")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}': choose one of {', '.join(DTYPES)}")
    place = find_device(device)
    if decoder_format is not None:
        check_decoder_format(decoder_format, place)
    if plot is not None:
        check_plot(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    if shape is not None:
        own = _random_model(shape, torch.float32 if dtype == "float32" else torch.bfloat16)
        own.to(place)  # type: ignore[arg-type]  # Transformers' own annotation
        extractor = WhisperFeatureExtractor() if is_speech_model(own.config.dense_config) else None
    else:
        own, tokenizer = load_converted(str(directory), dtype=dtype, device=device)
        extractor = getattr(tokenizer, "feature_extractor", None)
    if decoder_format is not None:
        quantise_decoder(own, decoder_format)
    metrics = bench(own, _own_text if shape is None else _random_text, choices, extractor)
    metrics = {"shape": shape or directory, "body": decoder_format, **metrics}
    if plot is not None:
        write_plot(metrics, plot)
    return metrics


def _random_model(shape: str, dtype: torch.dtype) -> TopKExpertsForCausalLM:
    shape_config(shape)
    return convert_at_random(random_model(shape, dtype))


def _random_text(models: Competitors) -> tuple[Tensor, Prompts]:
    return random_states(models.sparse.head), models.prompts


def _own_text(models: Competitors) -> tuple[Tensor, Prompts]:
    return sampled_text(models, POSITIONS, TEXTS)
