"""Fidelity of the sparse head to the dense one on text."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.head import LOGITS_AT_ONCE, TopKExpertsHead
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..progress import progress
from ..targets import inputs_of
from ..windows import NO_TOKEN, Window
from .confidence_bound import lower_bound
from .observations import Observer

TOP = 5
CONFIDENCE_BINS = 15
RANKED_EVERY = 64  # the tail's rank correlation needs sorting: measure it at every 64th position


@dataclass(frozen=True)
class Fidelity:
    """Metrics of the sparse head against the dense one.

    Attributes:
        agreement: top-1 agreement, the share of positions where the sparse argmax is the dense argmax.
        agreement_lower_bound: one-sided 95 % lower bound of what is measured on as many new documents.
        top5_containment: top-5 recall, the share of positions where the dense argmax is in the sparse top 5.
        kl: mean KL divergence of the sparse from the dense distribution, in nats.
        perplexity_dense: of the text under the dense head.
        perplexity_sparse: of the text under the sparse head; infinite if a token got no probability.
        log_z_error: mean of the sparse minus the dense log-sum-exp of all logits, in nats.
        log_z_absolute_error: mean of its absolute value, in nats.
        calibration_error_dense: expected calibration error (ECE) of the dense argmax: the mean gap between its
            probability and its accuracy, in 15 bins of equal width (Guo et al. 2017,
            https://arxiv.org/abs/1706.04599).
        calibration_error_sparse: ECE of the sparse argmax.
        tail_rank_correlation: Spearman correlation of tail and dense logits over the tokens of experts not picked, mean
            over every 64th position; NaN if all tokens are scored.
        bytes_read: bytes of head, router and tail read per position, as a share of the dense head's.
        positions: number of positions measured.
    """

    agreement: float
    agreement_lower_bound: float
    top5_containment: float
    kl: float
    perplexity_dense: float
    perplexity_sparse: float
    log_z_error: float
    log_z_absolute_error: float
    calibration_error_dense: float
    calibration_error_sparse: float
    tail_rank_correlation: float
    bytes_read: float
    positions: int


@dataclass
class _Sums:
    agreed: Counter[int] = field(default_factory=Counter)  # by document, like `positions`
    contained: int = 0
    kl: float = 0.0
    loss_dense: float = 0.0
    loss_sparse: float = 0.0
    log_z: float = 0.0
    log_z_absolute: float = 0.0
    dense_bins: Tensor = field(default_factory=lambda: torch.zeros(CONFIDENCE_BINS, 2, dtype=torch.float64))
    sparse_bins: Tensor = field(default_factory=lambda: torch.zeros(CONFIDENCE_BINS, 2, dtype=torch.float64))
    rank_correlations: list[Tensor] = field(default_factory=list)
    positions: Counter[int] = field(default_factory=Counter)
    predicted: int = 0


@torch.inference_mode()
def measure_fidelity(
    model: TopKExpertsForCausalLM, windows: list[Window], observer: Observer | None = None
) -> Fidelity:
    """Measure the sparse head at every position of the windows, whatever the model's head mode.

    The decoder runs once; both heads see the same hidden states, and their logits get the same soft-capping and
    scaling.

    Args:
        model: a converted model.
        windows: token ids; each token is a position, and each but the first of a window is predicted.
        observer: sees all that is compared; None for the metrics alone.
    """
    sums = _Sums()
    total = sum(window.positions for window in windows)
    head, heads = model.head, _BothHeads(model.head)
    with head.replaced_by(heads), progress("Comparing the heads", total, "positions") as advance:
        for window in windows:
            inputs, real = inputs_of([window], model)
            dense, sparse = model(**inputs, use_cache=False).logits[:, real[0]]
            hidden = heads.hidden[real[0]]
            sums.rank_correlations += _rank_correlations(head, dense, sparse, hidden)
            agrees = _add(sums, dense, sparse, torch.tensor(window.followers, device=dense.device))
            sums.agreed[window.document] += int(agrees.sum())
            sums.positions[window.document] += window.positions
            if observer is not None:
                observer.see(window, hidden, dense, sparse, agrees)
            advance(window.positions)
    agreed, positions = sums.agreed.total(), sums.positions.total()
    return Fidelity(
        agreement=agreed / positions,
        agreement_lower_bound=lower_bound([*sums.agreed.values()], [*sums.positions.values()], of_new_documents=True),
        top5_containment=sums.contained / positions,
        kl=sums.kl / positions,
        perplexity_dense=_exp(sums.loss_dense / max(1, sums.predicted)),
        perplexity_sparse=_exp(sums.loss_sparse / max(1, sums.predicted)),
        log_z_error=sums.log_z / positions,
        log_z_absolute_error=sums.log_z_absolute / positions,
        calibration_error_dense=_calibration_error(sums.dense_bins, sums.predicted),
        calibration_error_sparse=_calibration_error(sums.sparse_bins, sums.predicted),
        tail_rank_correlation=float(torch.stack(sums.rank_correlations).mean()) if sums.rank_correlations else math.nan,
        bytes_read=model.head.bytes_read() / model.head.dense_bytes(),
        positions=positions,
    )


def _add(sums: _Sums, dense: Tensor, sparse: Tensor, followers: Tensor) -> Tensor:
    """Add one window to the sums: logits [T, V] of both heads, next tokens [T]; returns which agree, [T] bool."""
    agrees = []
    at_once = max(1, LOGITS_AT_ONCE // dense.shape[-1])
    parts = zip(dense.split(at_once), sparse.split(at_once), followers.split(at_once), strict=True)
    for some_dense, some_sparse, some_followers in parts:
        log_p, log_q = some_dense.float().log_softmax(dim=-1), some_sparse.float().log_softmax(dim=-1)
        likeliest = log_q.topk(min(TOP, log_q.shape[-1])).indices
        best, best_sparse = (log.argmax(dim=-1, keepdim=True) for log in (log_p, log_q))
        agrees.append((best_sparse == best).squeeze(1))
        # At the argmax, where the difference rounds least.
        log_z = _log_sum_exp_at(some_sparse, log_q, best_sparse) - _log_sum_exp_at(some_dense, log_p, best)
        sums.log_z += float(log_z.sum())
        sums.log_z_absolute += float(log_z.abs().sum())
        for log, top, bins in ((log_p, best, sums.dense_bins), (log_q, best_sparse, sums.sparse_bins)):
            _add_to_bins(bins, log.gather(1, top)[:, 0].exp(), top[:, 0] == some_followers, some_followers != NO_TOKEN)
        sums.contained += int((likeliest == best).any(dim=-1).sum())
        sums.kl += float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        sums.loss_dense += float(F.nll_loss(log_p, some_followers, ignore_index=NO_TOKEN, reduction="sum"))
        sums.loss_sparse += float(F.nll_loss(log_q, some_followers, ignore_index=NO_TOKEN, reduction="sum"))
    sums.predicted += int((followers != NO_TOKEN).sum())
    return torch.cat(agrees)


def _log_sum_exp_at(logits: Tensor, log: Tensor, which: Tensor) -> Tensor:
    """The log-sum-exp, as logits minus log-softmax, [T, V], at the column `which`, [T, 1]."""
    return logits.gather(1, which).float() - log.gather(1, which)


def _add_to_bins(bins: Tensor, confidence: Tensor, is_right: Tensor, counts: Tensor) -> None:
    """Add to the sums of confidences and of hits per bin, [bins, 2]; the other arguments are [N]."""
    which = (confidence * CONFIDENCE_BINS).long().clamp_max(CONFIDENCE_BINS - 1)
    sums = torch.stack([confidence, is_right.float()], dim=-1) * counts.unsqueeze(-1)
    bins.index_add_(0, which.cpu(), sums.double().cpu())


def _calibration_error(bins: Tensor, predicted: int) -> float:
    return float((bins[:, 0] - bins[:, 1]).abs().sum()) / max(1, predicted)


def _rank_correlations(head: TopKExpertsHead, dense: Tensor, sparse: Tensor, hidden: Tensor) -> list[Tensor]:
    """Spearman correlations over unscored tokens at every 64th position: logits [T, V], hidden states [T, d]."""
    if head.num_experts_per_tok == head.num_experts:
        return []
    some = slice(len(dense) // 2, None, RANKED_EVERY)
    scored = head.scored_ids(head.pick(hidden[some]).experts).to(dense.device)
    correlations = []
    for one, other, ids in zip(dense[some], sparse[some], scored, strict=True):
        is_unscored = torch.ones_like(one, dtype=torch.bool).index_fill_(0, ids, False)
        ranks = torch.stack([_ranks(logits[is_unscored]) for logits in (one, other)])
        if (ranks != ranks[:, :1]).any(dim=1).all():  # undefined for constant values
            correlations.append(torch.corrcoef(ranks)[0, 1])
    return correlations


def _ranks(values: Tensor) -> Tensor:
    """Ascending ranks, ties at their mean rank: [n] to fp64 [n]."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[which]


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


class _BothHeads:
    """Runs the dense and the sparse head on the same states, and stacks their logits along the batch.

    Attributes:
        hidden: the last input, [N, d].
    """

    def __init__(self, head: TopKExpertsHead) -> None:
        self._head = head
        self.hidden = torch.empty(0)

    def __call__(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        dense = self._head.dense_logits(hidden)
        return torch.cat([dense, self._head.sparse_logits(self.hidden).view_as(dense)])
