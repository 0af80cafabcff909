"""Taking the last tokens out of a cache again, of every kind where that is possible."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers import cache_utils as layers

# By exact type: a class derived from one of these may keep more.
WINDOWS = (layers.DynamicSlidingWindowLayer, layers.StaticSlidingWindowLayer)
KNOWN_LAYERS = (layers.DynamicLayer, layers.StaticLayer, *WINDOWS)


def why_not_rolled_back(cache: Any) -> str | None:
    """Say why drafts could not be taken back from a cache; None if they can.

    Args:
        cache: what the model keeps of the prefix, after the prompt was read.
    """
    cache = _of_what_is_written(cache)
    attending = [layer for layer in getattr(cache, "layers", ()) if type(layer) in KNOWN_LAYERS]
    if not any(layer.is_initialized for layer in attending):
        return "there is no cache of attention states"
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return f"its {type(cache).__name__} cannot be rolled back"
    for layer in cache.layers:
        if type(layer) not in KNOWN_LAYERS and type(layer).__name__ != "DummyLayer":
            return f"a {type(layer).__name__} in its cache cannot be rolled back"
    return None


def _of_what_is_written(cache: Any) -> Any:
    """The part of a cache that grows with each token: the states of what an encoder has read stay as they are."""
    return cache.self_attention_cache if type(cache) is EncoderDecoderCache else cache


class RollBack:
    """Takes the last tokens out of a cache again."""

    def __init__(self, cache: DynamicCache | StaticCache | EncoderDecoderCache) -> None:
        """Watch a cache from now on.

        Args:
            cache: one that [`why_not_rolled_back`] has nothing against, with the prompt in it.
        """
        self._cache = cache
        every_layer: list[Any] = _of_what_is_written(cache).layers
        self._layers = [one for one in every_layer if type(one) in KNOWN_LAYERS and one.is_initialized]
        self._lengths = [-1] * len(self._layers)
        # For each layer with a window: what each of the last steps pushed out of it, if anything.
        self._pushed_out: list[tuple[Any, list[tuple[Tensor, Tensor] | None]]] = [
            (one, []) for one in self._layers if type(one) in WINDOWS
        ]

    def watches(self, cache: Any) -> bool:
        """Whether it is this cache that is watched.

        Args:
            cache: any.
        """
        return self._cache is cache

    def length(self) -> int:
        """Tokens that have gone through the cache; before the first block the states of an image may count instead."""
        return max(map(_states_in, self._growing())) or int(self._layers[0].get_seq_length())

    def room(self) -> int:
        """Tokens that still fit in."""
        static = [one for one in self._layers if type(one) is layers.StaticLayer]
        return min((one.max_cache_len - int(one.get_seq_length()) for one in static[:1]), default=sys.maxsize)

    def start_block(self) -> None:
        """Forget what was kept for an earlier block, and see from where the layers grow."""
        self._lengths = list(map(_states_in, self._layers))
        for _, pushed_out in self._pushed_out:
            pushed_out.clear()

    def before_step(self) -> None:
        """Keep what the next token will push out."""
        for layer, pushed_out in self._pushed_out:
            oldest = (layer.keys[:, :, :1].clone(), layer.values[:, :, :1].clone()) if _is_full(layer) else None
            pushed_out.append(oldest)

    def _growing(self) -> list[Any]:
        """The layers that the block went to: not those that attend to an image, whose states stay as they are."""
        pairs = zip(self._layers, self._lengths, strict=True)
        return [one for one, length in pairs if type(one) is not layers.DynamicLayer or _states_in(one) > length]

    def back(self, steps: int) -> None:
        """Take the last tokens out.

        Args:
            steps: how many; they were fed one by one.
        """
        for layer in self._growing():
            if type(layer) is layers.DynamicLayer:
                layer.crop(-steps)
            elif type(layer) is layers.StaticLayer:
                layer.cumulative_length.sub_(steps)  # what lies behind is masked, and written over
        for layer, pushed_out in self._pushed_out if steps else ():
            lost = [pair for pair in pushed_out[-steps:] if pair is not None]
            del pushed_out[-steps:]
            undo = _undo_dynamic if type(layer) is layers.DynamicSlidingWindowLayer else _undo_static
            undo(layer, steps, [keys for keys, _ in lost], [values for _, values in lost])


def _states_in(layer: Any) -> int:
    """How many states a growing layer holds; 0 for others, to which every token goes."""
    return int(layer.get_seq_length()) if type(layer) is layers.DynamicLayer else 0


def _is_full(layer: Any) -> bool:
    """Whether the next token pushes the oldest one out of a layer's window."""
    if type(layer) is layers.StaticSlidingWindowLayer:
        return bool(layer.cumulative_length_int >= layer.max_cache_len)
    return not layer.record_past and layer.keys.shape[2] >= layer.sliding_window - 1


def _undo_dynamic(layer: Any, steps: int, keys: list[Tensor], values: list[Tensor]) -> None:
    """Undo steps of a growing layer with a window, given what they pushed out."""
    # Its own `crop` would have it record the past, with which Transformers 5.16 allows one step between two crops.
    layer.cumulative_length -= steps
    layer.keys = torch.cat([*keys, layer.keys], dim=2)[:, :, :-steps]
    layer.values = torch.cat([*values, layer.values], dim=2)[:, :, :-steps]


def _undo_static(layer: Any, steps: int, keys: list[Tensor], values: list[Tensor]) -> None:
    """Undo steps of a static layer with a window, given what they pushed out."""
    layer.cumulative_length_int -= steps
    layer.cumulative_length.sub_(steps - len(keys))  # which stays where it is while the window is full
    if keys:
        layer.keys.copy_(torch.cat([*keys, layer.keys], dim=2)[:, :, : layer.max_cache_len])
        layer.values.copy_(torch.cat([*values, layer.values], dim=2)[:, :, : layer.max_cache_len])
