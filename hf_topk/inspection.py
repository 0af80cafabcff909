"""What is in a converted model, for people to read."""

import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from .loading import load_converted
from .model.errors import InputError
from .model.hub_card import read_beside

TOKENS_SHOWN = 12


def describe(name: str) -> Iterator[str]:
    """Lines on a converted model: its sizes, the recipe, the figures of its conversion, and its experts.

    Args:
        name: a folder, or a repository of the Hub.

    Raises:
        InputError: when there is no converted model of that name.
    """
    model, tokenizer = load_converted(name)
    figures = _figures(name)
    config, head = model.config, model.head
    yield f"{name}: {type(model.base).__name__} with {head.out_features:,} tokens of {head.in_features} numbers each"
    yield (
        f"{head.num_experts:,} experts of {head.expert_size}, {head.num_experts_per_tok:,} picked for a position, "
        f"{head.num_rescored:,} of their tokens and {head.num_always_on:,} always-on ones exact; "
        f"combine {config.combine}"
    )
    yield f"reads {head.bytes_read() / head.dense_bytes():.1%} of the dense head's bytes for a position"
    yield ""
    yield "Recipe"
    yield from (f"  {line}" for line in read_beside(name, "recipe.yaml").splitlines())
    yield ""
    yield "Figures, on held-out documents of the sample"
    yield from (
        f"  {key}: {value:.6g}" if isinstance(value, float) else f"  {key}: {value}"
        for key, value in figures.items()
        if not isinstance(value, list)
    )
    yield ""
    yield "Experts"
    yield f"  always on: {_shown(head.always_on_ids.tolist(), tokenizer)}"
    for number, ids in enumerate(head.expert_ids.tolist()):
        yield f"  {number:>5}: {_shown(list(dict.fromkeys(ids)), tokenizer)}"


def _figures(name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(read_beside(name, "figures.json") or "{}"))
    except (ValueError, TypeError) as error:
        raise InputError(f"figures.json of {name} is damaged ({error}): remove it, or fetch the model again") from error


def _shown(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Some of the tokens, spread over all of them, as they stand in text."""
    step = max(1, len(ids) // TOKENS_SHOWN)
    tokens = " ".join(repr(tokenizer.decode([token])) for token in ids[::step][:TOKENS_SHOWN])
    return f"{tokens} ... ({len(ids)} tokens)" if len(ids) > TOKENS_SHOWN else tokens
