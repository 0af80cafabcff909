"""Crops the last tokens from a KV cache, of every kind that allows it, when draft tokens are rejected."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers import cache_utils as layers

# By exact type: a subclass may keep other states.
WINDOWS = (layers.DynamicSlidingWindowLayer, layers.StaticSlidingWindowLayer)
KNOWN_LAYERS = (layers.DynamicLayer, layers.StaticLayer, *WINDOWS)


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments or outputs of a model; None if there is none.

    Args:
        arguments: by name; Transformers 5.24 renamed the cache.
    """
    return arguments.get("cache", arguments.get("past_key_values"))


def why_not_croppable(cache: Any, *, has_encoder: bool = False) -> str | None:
    """The reason why a KV cache cannot be cropped; None if it can.

    Args:
        cache: the model's, after prefill.
        has_encoder: whether the model is an encoder-decoder. Others may write to both parts of such a cache (BLT).
    """
    if has_encoder:
        cache = _growing_part(cache)
    if type(cache) is EncoderDecoderCache:
        return "its EncoderDecoderCache cannot be cropped"
    attending = [layer for layer in getattr(cache, "layers", ()) if type(layer) in KNOWN_LAYERS]
    if not any(layer.is_initialized for layer in attending):
        return "there is no KV cache"
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return f"its {type(cache).__name__} cannot be cropped"
    for layer in cache.layers:
        if type(layer) not in KNOWN_LAYERS and type(layer).__name__ != "DummyLayer":
            return f"a {type(layer).__name__} in its cache cannot be cropped"
    return None


def _growing_part(cache: Any) -> Any:
    """The part of a cache that grows with each token; cross-attention states are constant."""
    return cache.self_attention_cache if type(cache) is EncoderDecoderCache else cache


class CroppableCache:
    """A KV cache whose last tokens can be cropped."""

    def __init__(self, cache: DynamicCache | StaticCache | EncoderDecoderCache) -> None:
        """Wrap a cache.

        Args:
            cache: after prefill; [`why_not_croppable`] returned None for it.
        """
        self._cache = cache
        every_layer: list[Any] = _growing_part(cache).layers
        self._layers = [one for one in every_layer if type(one) in KNOWN_LAYERS and one.is_initialized]
        self._lengths = [-1] * len(self._layers)
        # For each sliding-window layer: the state that each of the last steps evicted, if any.
        self._evicted: list[tuple[Any, list[tuple[Tensor, Tensor] | None]]] = [
            (one, []) for one in self._layers if type(one) in WINDOWS
        ]

    def wraps(self, cache: Any) -> bool:
        """Whether this is the wrapped cache.

        Args:
            cache: any.
        """
        return self._cache is cache

    def length(self) -> int:
        """Tokens written to the cache; before the first block, states of an image may be counted instead."""
        return max(map(_states_in, self._growing_layers())) or int(self._layers[0].get_seq_length())

    def room(self) -> int:
        """Number of tokens that the cache has room for."""
        static = [one for one in self._layers if type(one) is layers.StaticLayer]
        return min((one.max_cache_len - int(one.get_seq_length()) for one in static[:1]), default=sys.maxsize)

    def start_block(self) -> None:
        """Discard the states kept for an earlier block, and record the lengths of the layers."""
        self._lengths = list(map(_states_in, self._layers))
        for _, evicted in self._evicted:
            evicted.clear()

    def before_step(self) -> None:
        """Keep the states that the next token will evict."""
        for layer, evicted in self._evicted:
            oldest = (layer.keys[:, :, :1].clone(), layer.values[:, :, :1].clone()) if _is_full(layer) else None
            evicted.append(oldest)

    def _growing_layers(self) -> list[Any]:
        """The layers that the block was written to: not those that attend to an image, which are constant."""
        pairs = zip(self._layers, self._lengths, strict=True)
        return [one for one, length in pairs if type(one) is not layers.DynamicLayer or _states_in(one) > length]

    def crop(self, steps: int) -> None:
        """Crop the last tokens.

        Args:
            steps: number of tokens; they were fed one by one.
        """
        for layer in self._growing_layers():
            if type(layer) is layers.DynamicLayer:
                layer.crop(-steps)
            elif type(layer) is layers.StaticLayer:
                layer.cumulative_length.sub_(steps)  # later states are masked, then overwritten
        for layer, evicted in self._evicted if steps else ():
            lost = [pair for pair in evicted[-steps:] if pair is not None]
            del evicted[-steps:]
            undo = _undo_dynamic if type(layer) is layers.DynamicSlidingWindowLayer else _undo_static
            undo(layer, steps, [keys for keys, _ in lost], [values for _, values in lost])


def _states_in(layer: Any) -> int:
    """Number of states in a dynamic layer; 0 for other layers, to which every token is written."""
    return int(layer.get_seq_length()) if type(layer) is layers.DynamicLayer else 0


def _is_full(layer: Any) -> bool:
    """Whether the next token evicts the oldest one from a layer's window."""
    if type(layer) is layers.StaticSlidingWindowLayer:
        return bool(layer.cumulative_length_int >= layer.max_cache_len)
    return not layer.record_past and layer.keys.shape[2] >= layer.sliding_window - 1


def _undo_dynamic(layer: Any, steps: int, keys: list[Tensor], values: list[Tensor]) -> None:
    """Undo steps of a dynamic sliding-window layer, given the states that they evicted."""
    # Its own `crop` records the past, and Transformers 5.16 then allows only one step between two crops.
    layer.cumulative_length -= steps
    layer.keys = torch.cat([*keys, layer.keys], dim=2)[:, :, :-steps]
    layer.values = torch.cat([*values, layer.values], dim=2)[:, :, :-steps]


def _undo_static(layer: Any, steps: int, keys: list[Tensor], values: list[Tensor]) -> None:
    """Undo steps of a static sliding-window layer, given the states that they evicted."""
    layer.cumulative_length_int -= steps
    layer.cumulative_length.sub_(steps - len(keys))  # it does not grow while the window is full
    if keys:
        layer.keys.copy_(torch.cat([*keys, layer.keys], dim=2)[:, :, : layer.max_cache_len])
        layer.values.copy_(torch.cat([*values, layer.values], dim=2)[:, :, : layer.max_cache_len])
