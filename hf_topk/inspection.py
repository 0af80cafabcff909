"""Describes a converted model for people."""

import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from .loading import load_converted
from .model.errors import InputError
from .model.hub_card import read_beside

TOKENS_SHOWN = 12


def describe(name: str) -> Iterator[str]:
    """Yield lines about a converted model: sizes, recipe, metrics of its conversion, and experts.

    Args:
        name: a folder, or a repository of the Hub.

    Raises:
        InputError: when there is no converted model of that name.
    """
    model, tokenizer = load_converted(name)
    metrics = _metrics(name)
    config, head = model.config, model.head
    yield f"{name}: {type(model.base).__name__} with a head of {head.out_features:,} x {head.in_features:,}"
    yield (
        f"{head.num_experts:,} experts of {head.expert_size}, {head.num_experts_per_tok:,} picked per position, "
        f"{head.num_rescored:,} exact logits, {head.num_always_on:,} always-on tokens; "
        f"combine {config.combine}"
    )
    yield f"reads {head.bytes_read() / head.dense_bytes():.1%} of the dense head's bytes per position"
    yield ""
    yield "Recipe"
    yield from (f"  {line}" for line in read_beside(name, "recipe.yaml").splitlines())
    yield ""
    yield "Metrics, on held-out documents of the calibration text"
    yield from (
        f"  {key}: {value:.6g}" if isinstance(value, float) else f"  {key}: {value}"
        for key, value in metrics.items()
        if not isinstance(value, list)
    )
    yield ""
    yield "Experts"
    yield f"  always on: {_shown(head.always_on_ids.tolist(), tokenizer)}"
    for number, ids in enumerate(head.expert_ids.tolist()):
        yield f"  {number:>5}: {_shown(list(dict.fromkeys(ids)), tokenizer)}"


def _metrics(name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(read_beside(name, "figures.json") or "{}"))
    except (ValueError, TypeError) as error:
        raise InputError(f"figures.json of {name} is damaged ({error}): remove it, or fetch the model again") from error


def _shown(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Evenly spaced tokens, decoded."""
    step = max(1, len(ids) // TOKENS_SHOWN)
    tokens = " ".join(repr(tokenizer.decode([token])) for token in ids[::step][:TOKENS_SHOWN])
    return f"{tokens} ... ({len(ids)} tokens)" if len(ids) > TOKENS_SHOWN else tokens
