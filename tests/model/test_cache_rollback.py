"""A cropped cache equals one without the cropped tokens; other caches are recognised."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers import cache_utils as layers

from hf_topk.model.cache_rollback import CroppableCache, why_not_croppable

ROWS, HEADS, DIM = 2, 3, 4
MAX_LENGTH, WINDOW = 32, 8
KINDS: dict[str, Callable[[], Any]] = {
    "dynamic": layers.DynamicLayer,
    "static": lambda: layers.StaticLayer(MAX_LENGTH),
    "dynamic window": lambda: layers.DynamicSlidingWindowLayer(WINDOW),
    "static window": lambda: layers.StaticSlidingWindowLayer(MAX_LENGTH, WINDOW),
}


def cache_of(*kinds: str) -> DynamicCache | StaticCache:
    """A cache with layers of these kinds."""
    cache: Any = StaticCache.__new__(StaticCache) if "static" in kinds[0] else DynamicCache()
    layers.Cache.__init__(cache, layers=[KINDS[kind]() for kind in kinds])
    return cache


def states(seed: int, tokens: int) -> Tensor:
    return torch.randn(ROWS, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def feed(cache: Any, seed: int, tokens: int) -> list[Tensor]:
    """Feed tokens all at once, and return what each layer attends to."""
    seen = []
    for number in range(len(cache.layers)):
        keys = states(10 * seed + number, tokens)
        seen += cache.update(keys, -keys, number)
    return seen


def check_same(one: Any, other: Any) -> None:
    """Check that two caches are equal, now and after further tokens."""
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    for seed in range(900, 900 + WINDOW + 1):
        for ours, theirs, layer in zip(feed(one, seed, 1), feed(other, seed, 1), doubled(one.layers), strict=True):
            used = int(layer.get_seq_length()) if type(layer) is layers.StaticLayer else None
            if type(layer) is layers.StaticSlidingWindowLayer:
                used = min(int(layer.get_seq_length()), WINDOW)
            assert ours[:, :, :used].equal(theirs[:, :, :used])  # what lies behind is masked


def doubled(some: list[Any]) -> list[Any]:
    """A key and a value state per layer."""
    return [one for one in some for _ in range(2)]


# Short of the window all along; filling it up within the block, at its start and at its end; full from the start.
@pytest.mark.parametrize("prompt", [1, 4, 6, 7, 8, 13])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), ("dynamic window", "dynamic")], ids=" and ".join)
def test_a_cropped_cache_equals_one_without_the_cropped_tokens(kinds: tuple[str, ...], prompt: int) -> None:
    for steps in range(1, 6):
        for cropped in range(steps):
            cache, plain = cache_of(*kinds), cache_of(*kinds)
            feed(cache, 0, prompt)
            feed(plain, 0, prompt)
            croppable, length = CroppableCache(cache), prompt
            for block in (1, 2):  # the second one must not undo what the first one did
                croppable.start_block()
                for step in range(steps):
                    croppable.before_step()
                    feed(cache, 100 * block + step, 1)
                    if step < steps - cropped:
                        feed(plain, 100 * block + step, 1)
                croppable.crop(cropped)
                length += steps - cropped
                assert croppable.length() == length
            check_same(cache, plain)


def test_layers_that_a_block_is_not_written_to_are_not_cropped() -> None:
    cache = cache_of("dynamic", "dynamic")
    feed(cache, 0, 5)
    image = cache.layers[1].keys
    croppable = CroppableCache(cache)
    croppable.start_block()
    for step in range(3):
        croppable.before_step()
        cache.update(states(step, 1), states(step, 1), 0)
    croppable.crop(2)
    assert croppable.length() == cache.layers[0].get_seq_length() == 6
    assert cache.layers[1].keys.equal(image)


@pytest.mark.parametrize(("kind", "room"), [("static", MAX_LENGTH - 5), ("dynamic", None), ("static window", None)])
def test_room_is_what_a_static_layer_has_left(kind: str, room: int | None) -> None:
    cache = cache_of(kind)
    feed(cache, 0, 5)
    found = CroppableCache(cache).room()
    assert found == room if room else found > 1 << 30


def test_recognises_the_wrapped_cache() -> None:
    cache, other = cache_of("dynamic"), cache_of("dynamic")
    feed(cache, 0, 5)
    assert CroppableCache(cache).wraps(cache)
    assert not CroppableCache(cache).wraps(other)


class OtherLayer(layers.DynamicLayer):
    """A subclass, whose states are unknown."""


class OtherCache(DynamicCache):
    """A subclass, whose states are unknown."""


def with_prompt(cache: Any) -> Any:
    feed(cache, 0, 5)
    return cache


def offloaded() -> Any:
    cache = with_prompt(cache_of("dynamic"))
    cache.offloading = True
    return cache


def of_other_class() -> Any:
    cache = OtherCache()
    cache.update(states(0, 5), states(1, 5), 0)
    return cache


def with_other_layer() -> Any:
    cache = with_prompt(cache_of("dynamic", "dynamic"))
    cache.layers[1] = OtherLayer()
    return cache


def with_quantised_layer() -> Any:
    cache = with_prompt(cache_of("dynamic", "dynamic"))
    cache.layers[1] = layers.QuantoQuantizedLayer.__new__(layers.QuantoQuantizedLayer)
    return cache


REASONS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "none": (lambda: None, "there is no KV cache"),
    "empty": (lambda: cache_of("dynamic"), "there is no KV cache"),
    "offloaded": (offloaded, "its DynamicCache cannot be cropped"),
    "of a class derived": (of_other_class, "its OtherCache cannot be cropped"),
    "encoder-decoder": (
        lambda: EncoderDecoderCache(with_prompt(cache_of("dynamic")), with_prompt(cache_of("dynamic"))),
        "its EncoderDecoderCache cannot be cropped",
    ),
    "a layer derived": (with_other_layer, "a OtherLayer in its cache cannot be cropped"),
    "quantised": (with_quantised_layer, "a QuantoQuantizedLayer in its cache cannot be cropped"),
    "dynamic": (lambda: with_prompt(cache_of("dynamic", "dynamic window")), None),
    "static": (lambda: with_prompt(cache_of("static", "static window")), None),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_against_cropping(name: str) -> None:
    make, reason = REASONS[name]
    assert why_not_croppable(make()) == reason
