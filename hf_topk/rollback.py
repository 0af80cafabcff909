"""Taking the last tokens out of a cache again, of every kind where that is possible."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers import cache_utils as layers

# By exact type: a class derived from one of these may keep more.
CROPPABLE_LAYERS = (layers.DynamicLayer, layers.DynamicSlidingWindowLayer)
STATIC_LAYERS = (layers.StaticLayer, layers.StaticSlidingWindowLayer)


def why_not_rolled_back(cache: Any) -> str | None:
    """Say why drafts could not be taken back from a cache; None if they can.

    Args:
        cache: what the model keeps of the prefix, after the prompt was read.
    """
    if cache is None:
        return "there is no cache of attention states"
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return f"its {type(cache).__name__} cannot be rolled back"
    for layer in cache.layers:
        if type(layer) not in (*CROPPABLE_LAYERS, *STATIC_LAYERS) and type(layer).__name__ != "DummyLayer":
            return f"a {type(layer).__name__} in its cache cannot be rolled back"
    return None


class RollBack:
    """Takes the last tokens out of a cache again."""

    def __init__(self, cache: DynamicCache | StaticCache) -> None:
        """Watch a cache from now on.

        Args:
            cache: one that [`why_not_rolled_back`] has nothing against, with the prompt in it.
        """
        known = (*CROPPABLE_LAYERS, *STATIC_LAYERS)
        every_layer: list[Any] = cache.layers
        self._layers = [one for one in every_layer if type(one) in known and one.is_initialized]
        sliding = [one for one in self._layers if type(one) is layers.DynamicSlidingWindowLayer]
        self._recording = [one for one in sliding if not one.record_past]
        for layer in self._recording:
            layer.activate_past_recording()
        # For each static layer with a window: what its last steps pushed out of the window.
        self._pushed_out: list[tuple[Any, list[tuple[Tensor, Tensor]]]] = [
            (one, []) for one in self._layers if type(one) is layers.StaticSlidingWindowLayer
        ]

    def length(self) -> int:
        """Tokens that have gone through the cache."""
        return int(self._layers[0].get_seq_length())

    def room(self) -> int:
        """Tokens that still fit in."""
        static = [one for one in self._layers if type(one) is layers.StaticLayer]
        return min((one.max_cache_len - int(one.get_seq_length()) for one in static[:1]), default=sys.maxsize)

    def start_block(self) -> None:
        """Forget what was kept for an earlier block."""
        self.back(0)
        for _, pushed_out in self._pushed_out:
            pushed_out.clear()

    def before_step(self) -> None:
        """Keep what the next token will push out."""
        for layer, pushed_out in self._pushed_out:
            if layer.cumulative_length_int >= layer.max_cache_len:
                pushed_out.append((layer.keys[:, :, :1].clone(), layer.values[:, :, :1].clone()))

    def back(self, steps: int) -> None:
        """Take the last tokens out.

        Args:
            steps: how many; they were fed one by one.
        """
        for layer in self._layers:
            if type(layer) in CROPPABLE_LAYERS:
                layer.crop(-steps)
            elif type(layer) is layers.StaticLayer:
                layer.cumulative_length.sub_(steps)  # what lies behind is masked, and written over
        for layer, pushed_out in self._pushed_out:
            for _ in range(steps):
                _unpush(layer, pushed_out)

    def finish(self) -> None:
        """Leave the cache as it would be had nobody watched it."""
        for layer in self._recording:
            layer.record_past = False


def _unpush(layer: Any, pushed_out: list[tuple[Tensor, Tensor]]) -> None:
    """Undo one step of a static layer with a window."""
    layer.cumulative_length_int -= 1
    if layer.cumulative_length_int < layer.max_cache_len:
        layer.cumulative_length.sub_(1)
        return
    first_key, first_value = pushed_out.pop()
    layer.keys.copy_(torch.cat([first_key, layer.keys[:, :, :-1]], dim=2))
    layer.values.copy_(torch.cat([first_value, layer.values[:, :, :-1]], dim=2))
