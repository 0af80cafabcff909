"""How faithful the sparse head is to the dense one, on text."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from ..head import LOGITS_AT_ONCE, TopKExpertsHead
from ..modeling_topk_experts import TopKExpertsForCausalLM
from ..progress import progress
from ..text import Window

TOP = 5
NO_TOKEN = -100
WINDOW_LENGTH = 256  # tokens that the model reads in one pass


@dataclass(frozen=True)
class Fidelity:
    """Figures of the sparse head beside the dense one.

    Attributes:
        agreement: share of positions where the sparse and the dense argmax are the same token.
        top5_containment: share of positions where the dense argmax is among the five likeliest sparse tokens.
        kl: mean Kullback-Leibler divergence of the sparse from the dense distribution, in nats.
        perplexity_dense: of the text under the dense head.
        perplexity_sparse: of the text under the sparse head; infinite where a token got no probability.
        bytes_read: bytes of head, router and tail read for one position, as a share of the dense head's.
        positions: number of positions measured.
    """

    agreement: float
    top5_containment: float
    kl: float
    perplexity_dense: float
    perplexity_sparse: float
    bytes_read: float
    positions: int


def readable_length(config: PreTrainedConfig, wanted: int = WINDOW_LENGTH) -> int:
    """How many of the wanted tokens a model can read in one pass.

    Args:
        config: of a dense or a converted model.
        wanted: tokens in a window.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(wanted, longest) if isinstance(longest, int) and longest > 0 else wanted


@dataclass
class _Sums:
    agreed: int = 0
    contained: int = 0
    kl: float = 0.0
    loss_dense: float = 0.0
    loss_sparse: float = 0.0
    positions: int = 0
    predicted: int = 0


@torch.inference_mode()
def measure_fidelity(model: TopKExpertsForCausalLM, windows: list[Window]) -> Fidelity:
    """Measure the sparse head on every position of the windows, whatever the model's head mode.

    The dense model runs once; both heads see the same hidden states, and their logits pass through the same
    soft-capping and scaling.

    Args:
        model: a converted model.
        windows: token ids to read; each token is a position, and each but a window's first one is predicted.
    """
    sums = _Sums()
    total = sum(len(window.token_ids) for window in windows)
    with both_heads(model), progress("Comparing the heads", total, "positions") as advance:
        for window in windows:
            token_ids = torch.tensor([window.token_ids], device=model.device)
            dense, sparse = model(input_ids=token_ids, use_cache=False).logits
            _add(sums, dense, sparse, token_ids[0])
            advance(len(window.token_ids))
    return Fidelity(
        agreement=sums.agreed / sums.positions,
        top5_containment=sums.contained / sums.positions,
        kl=sums.kl / sums.positions,
        perplexity_dense=_exp(sums.loss_dense / max(1, sums.predicted)),
        perplexity_sparse=_exp(sums.loss_sparse / max(1, sums.predicted)),
        bytes_read=model.head.bytes_read() / model.head.dense_bytes(),
        positions=sums.positions,
    )


def _add(sums: _Sums, dense: Tensor, sparse: Tensor, token_ids: Tensor) -> None:
    """Add the figures of one window: logits [T, V] of both heads, token ids [T]."""
    followers = torch.cat([token_ids[1:], token_ids.new_tensor([NO_TOKEN])])  # the last position predicts none of ours
    at_once = max(1, LOGITS_AT_ONCE // dense.shape[-1])
    parts = zip(dense.split(at_once), sparse.split(at_once), followers.split(at_once), strict=True)
    for some_dense, some_sparse, some_followers in parts:
        log_p, log_q = some_dense.float().log_softmax(dim=-1), some_sparse.float().log_softmax(dim=-1)
        likeliest = log_q.topk(min(TOP, log_q.shape[-1])).indices
        best = log_p.argmax(dim=-1, keepdim=True)
        sums.agreed += int((log_q.argmax(dim=-1, keepdim=True) == best).sum())
        sums.contained += int((likeliest == best).any(dim=-1).sum())
        sums.kl += float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        sums.loss_dense += float(F.nll_loss(log_p, some_followers, ignore_index=NO_TOKEN, reduction="sum"))
        sums.loss_sparse += float(F.nll_loss(log_q, some_followers, ignore_index=NO_TOKEN, reduction="sum"))
    sums.positions += len(token_ids)
    sums.predicted += len(token_ids) - 1


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


class _BothHeads(nn.Module):
    """Runs the dense and the sparse head on the same states and stacks their logits along the batch."""

    def __init__(self, head: TopKExpertsHead) -> None:
        super().__init__()
        self.weight, self.bias, self._sparse = head.weight, head.bias, head

    def forward(self, hidden: Tensor) -> Tensor:
        dense = F.linear(hidden, self.weight, self.bias)
        sparse = self._sparse.sparse_logits(hidden.reshape(-1, hidden.shape[-1]))
        return torch.cat([dense, sparse.view_as(dense)])


@contextmanager
def both_heads(model: TopKExpertsForCausalLM) -> Iterator[None]:
    """For a while, let the model return dense logits and, behind them along the batch, sparse ones."""
    head = model.head
    model.base.set_submodule(model.head_name, _BothHeads(head))
    try:
        yield
    finally:
        model.base.set_submodule(model.head_name, head)
