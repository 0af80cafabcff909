"""Small heads with random experts, and plain references for their results."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_topk import TopKExpertsHead
from support.tiny_models import VOCAB_SIZE, tiny_converted, tiny_dense

DENSE = {
    (bias, dtype): tiny_dense(bias=bias).to(dtype)
    for bias in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
}
COMBINES = ("exact", "router", "learned")
# About half a unit in the last place of the products, at logits of up to 10.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}, torch.bfloat16: {"rtol": 2e-2, "atol": 6e-2}}

seeds = st.integers(0, 2**16)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    """Sizes of a partition of the vocabulary, with or without padding, and k."""
    num_always_on, expert_size = draw(st.integers(0, 30)), draw(st.integers(1, 40))
    num_experts = math.ceil((VOCAB_SIZE - num_always_on) / expert_size)
    return {
        "num_always_on": num_always_on,
        "expert_size": expert_size,
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, num_experts)),
    }


def make_head(*, bias: bool = False, dtype: torch.dtype = torch.float32, **choices: Any) -> TopKExpertsHead:
    """A sparse head; it scores all tokens of the picked experts unless `num_rescored` is given."""
    return tiny_converted(DENSE[bias, dtype], **{"head_mode": "sparse", **choices}).head.requires_grad_(False)


def make_hidden(seed: int, positions: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(positions, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense_logits(head: TopKExpertsHead, hidden: Tensor) -> Tensor:
    return F.linear(hidden, head.weight, head.bias)


def unique_ids(head: TopKExpertsHead, expert: int) -> Tensor:
    return head.expert_ids[expert].unique()


def picked_experts(head: TopKExpertsHead, hidden: Tensor) -> list[list[int]]:
    """The k best experts of each position, by the router."""
    return [row.argsort(descending=True)[: head.num_experts_per_tok].tolist() for row in head.router(hidden)]


def scored_mask(head: TopKExpertsHead, hidden: Tensor) -> Tensor:
    """The mask of tokens that are scored without a screen, bool [N, V], one position at a time."""
    mask = torch.zeros(hidden.shape[0], head.out_features, dtype=torch.bool)
    mask[:, head.always_on_ids] = True
    for position, experts in enumerate(picked_experts(head, hidden)):
        for expert in experts:
            mask[position, head.expert_ids[expert]] = True
    return mask
