"""Checks that the studies of model types share."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_topk.model import drafting
from hf_topk.model.errors import TopKExpertsError


def check(is_right: bool, failure: str) -> None:
    """Raise a TopKExpertsError with the message `failure` unless a result is right."""
    if not is_right:
        raise TopKExpertsError(failure)


def are_close(one: Tensor, other: Tensor) -> bool:
    """Whether logits have the same shape and differ only by rounding."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@contextmanager
def every_draft() -> Iterator[None]:
    """Inside the context, lossless decoding drafts even where the router is unsure, as in tiny models."""
    before, drafting.DOUBT_A_PASS = drafting.DOUBT_A_PASS, math.inf
    try:
        yield
    finally:
        drafting.DOUBT_A_PASS = before
