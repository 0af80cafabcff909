"""What the studies of model types have in common: how a result is checked."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_topk.model import drafting
from hf_topk.model.errors import TopKExpertsError


def check(is_right: bool, what_else: str) -> None:
    """Raise a TopKExpertsError that says what is wrong, unless a result is right."""
    if not is_right:
        raise TopKExpertsError(what_else)


def are_close(one: Tensor, other: Tensor) -> bool:
    """Whether logits of the same shape differ by rounding alone."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@contextmanager
def every_draft() -> Iterator[None]:
    """Let lossless decoding draft where the router is unsure, too, as a tiny model's router always is."""
    before, drafting.DOUBTFUL_SHARE = drafting.DOUBTFUL_SHARE, 1.0
    try:
        yield
    finally:
        drafting.DOUBTFUL_SHARE = before
