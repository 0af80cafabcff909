"""`hf-topk bench`: takes what a user asks for, and refuses it before anything long begins."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..loading import DTYPES, find_device, load_converted
from ..model.errors import InputError
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from .competitors import Competitors, recorded_states
from .decode_speed import PROMPT_LENGTH
from .plot import check_plot, write_plot
from .quantised_decoder import check_body, quantise_body
from .random_experts import STATES, convert_at_random, random_states
from .shapes import random_model, shape_config
from .suite import Choices, bench

TEXTS_AT_ONCE = 32


def run_bench(
    directory: str | None,
    shape: str | None,
    choices: Choices,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    body: str | None = None,
    threads: int | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Measure a converted model, or a published shape with random weights.

    The head is timed on states that the model itself comes to while it writes; with random weights, on random ones of
    the same size.

    Args:
        directory: a converted model; None with a shape.
        shape: one of `SHAPES`; None with a directory.
        choices: what to measure.
        dtype: "float32", "bfloat16", or "auto": as the model is stored, bfloat16 with a shape.
        device: such as "cpu" or "cuda:0", or "auto": the accelerator if there is one.
        body: "int8" or "int4" to keep the decoder's linear layers in so many bits; None to leave them as they are.
        threads: that torch uses from now on; None for what it chose.
        plot: a file to draw the figures to.

    Returns:
        The figures of [`bench`], and `shape`, the name of what was measured.

    Raises:
        InputError: when there is neither a directory nor a shape, or both, or one of the choices is not to be had.
    """
    if (directory is None) == (shape is None):
        raise InputError("give one of the two: a converted model's folder, or --shape with a published model's name")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}': choose one of {', '.join(DTYPES)}")
    place = find_device(device)
    if body is not None:
        check_body(body, place)
    if plot is not None:
        check_plot(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    if shape is not None:
        own = _random_model(shape, torch.float32 if dtype == "float32" else torch.bfloat16)
        own.to(place)  # type: ignore[arg-type]  # as Transformers declares it
    else:
        own = load_converted(str(directory), dtype=dtype, device=device)[0]
    if body is not None:
        quantise_body(own, body)
    figures = bench(own, _own_states if shape is None else _random_states, choices)
    figures = {"shape": shape or directory, "body": body, **figures}
    if plot is not None:
        write_plot(figures, plot)
    return figures


def _random_model(shape: str, dtype: torch.dtype) -> TopKExpertsForCausalLM:
    shape_config(shape)
    return convert_at_random(random_model(shape, dtype))


def _random_states(models: Competitors) -> Tensor:
    return random_states(models.sparse.head)


def _own_states(models: Competitors) -> Tensor:
    return recorded_states(models.dense, STATES, TEXTS_AT_ONCE, PROMPT_LENGTH)
