"""Quantises rows to 4 and 2 bits: the router's, and the tail's rows of the tokens that it screens."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_topk.model.head import TopKExpertsHead
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.model.packed_rows import SMALLEST_SCALE, PackedRows, round_to_levels
from hf_topk.model.router import Router
from hf_topk.model.tail import Tail
from hf_topk.progress import progress

SMALLEST_PROBABILITY = 1e-12
SMALLEST_VARIANCE = 1e-6  # of a direction of the hidden states, relative to the largest
ROWS_AT_ONCE = 4096
ROWS_FOR_STEPS = 8192  # rows that the quantisation steps are fitted on
STEPS_TRIED = (0.25, 0.3, 0.35, 0.4, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)  # in standard deviations
# The rarer a token, the less its mean probability transfers to other text. Of the powers of it from 0 to 1 that were
# tried, this one gave the lowest perplexity on text of another kind.
TEMPER = 0.5


class Metric(NamedTuple):
    """The metric of errors of a row: the mean square error of its products with hidden states.

    Attributes:
        mean: hidden state, [d].
        root: symmetric square root of the states' covariance, [d, d].
        inverse_root: its inverse.
    """

    mean: Tensor
    root: Tensor
    inverse_root: Tensor


def metric_of(states: Tensor) -> Metric:
    """The metric of a sample of hidden states, [N, d]."""
    states = states.float()
    mean = states.mean(dim=0)
    values, vectors = torch.linalg.eigh((states - mean).t() @ (states - mean) / len(states))
    values = values.clamp_min(values[-1].clamp_min(SMALLEST_SCALE) * SMALLEST_VARIANCE)
    return Metric(mean, vectors * values.sqrt() @ vectors.t(), vectors / values.sqrt() @ vectors.t())


class Ranks(NamedTuple):
    """How many numbers are kept of each row.

    Attributes:
        router: of an expert's row of the router.
        tail: of a token's row of the screen.
    """

    router: int
    tail: int


class Quantiser:
    """Quantises router and screen of a converted model, from the float rows of its router, as often as is asked."""

    def __init__(self, model: TopKExpertsForCausalLM, metric: Metric, probabilities: Tensor, unused: list[int]) -> None:
        """Prepare.

        Args:
            model: its router is trained, and not packed.
            metric: of the hidden states.
            probabilities: mean probability of each token over the calibration text, fp32 [V].
            unused: unused ids.
        """
        self._model, self._floats = model, model.head.router
        self._metric, self._probabilities, self._unused = metric, probabilities, unused
        self._routers: dict[int, Router] = {}
        self._tails: dict[int, Tail] = {}

    @torch.no_grad()
    def __call__(self, ranks: Ranks) -> None:
        """Give the model a router and a tail of these ranks, in the dtype of the head; each is made once.

        Args:
            ranks: of both.
        """
        head, config = self._model.head, self._model.config
        config.router_rank, config.tail_rank, config.router_packed = *ranks, True
        device = head.weight.device
        if ranks.router not in self._routers:
            router = Router(head.in_features, head.num_experts, ranks.router).to(device).requires_grad_(False)
            router.floats.copy_(self._floats.floats)
            router.bias.copy_(self._floats.bias)
            pack_router(router, self._metric, head.stored_type)
            self._routers[ranks.router] = router
        head.router = self._routers[ranks.router]
        if ranks.tail not in self._tails:
            head.tail = Tail(head.in_features, head.num_experts, head.expert_size, ranks.tail).to(device)
            fit_tail(head, self._metric, self._probabilities, self._unused)
            self._tails[ranks.tail] = head.tail.requires_grad_(False)
        head.tail = self._tails[ranks.tail]
        cast_additions(head)


def cast_additions(head: TopKExpertsHead) -> None:
    """Round the added tensors, fitted in fp32, to their stored dtype, and cast them to the dtype of the dense head."""
    for module in head.children():
        module.to(head.stored_type).to(head.weight.dtype)


@torch.no_grad()
def pack_router(router: Router, metric: Metric, dtype: torch.dtype) -> None:
    """Quantise a trained router to 4 and 2 bits.

    Args:
        router: with float rows; packed in place.
        metric: of the hidden states.
        dtype: dtype that it is stored in.
    """
    if router.rows is None:
        return
    rows = router.rows.float() - router.rows.float().mean(dim=0)
    projection = _set_basis(router, metric, lambda some: rows[some], torch.ones(len(rows), device=rows.device), dtype)
    router.pack(rows @ projection, metric.mean)


@torch.no_grad()
def fit_tail(head: TopKExpertsHead, metric: Metric, probabilities: Tensor, unused: list[int]) -> None:
    """Fit the tail: the prior and the quantised screen rows of all routed tokens.

    Args:
        head: its tail is set in place.
        metric: of the hidden states.
        probabilities: mean probability of each token over the calibration text, fp32 [V].
        unused: unused ids.
    """
    tempered = probabilities.clamp_min(SMALLEST_PROBABILITY).pow(TEMPER)
    head.tail.log_prior.copy_(_log_prior(head, probabilities, unused))
    experts_at_once = max(1, ROWS_AT_ONCE // head.expert_size)
    with progress("Fitting the tail", 2 * head.num_experts, "experts") as advance:

        def rows_of(some: slice) -> Tensor:
            advance(len(head.expert_ids[some]))
            rows = head.weight[head.expert_ids[some]].float()
            return rows - rows.mean(dim=1, keepdim=True)

        weights = tempered[head.expert_ids]
        projection = _set_basis(head.tail, metric, rows_of, weights, head.stored_type, experts_at_once)
        for some in _slices(head.num_experts, experts_at_once):
            rows = rows_of(some)  # (n, S, d)
            head.tail.set_codes(some, rows @ projection)
            bias = rows @ metric.mean
            if (added := head.full_bias) is not None:
                bias = bias + added[head.expert_ids[some]].float()
            head.tail.bias[some] = bias - bias.mean(dim=-1, keepdim=True)


def _log_prior(head: TopKExpertsHead, probabilities: Tensor, unused: list[int]) -> Tensor:
    """Log p(v | e), [M, S], tempered, except that unused ids keep their share of their expert."""
    logs = probabilities.clamp_min(SMALLEST_PROBABILITY).log()
    is_unused = torch.zeros_like(logs, dtype=torch.bool)
    is_unused[unused] = True
    logs, is_unused = logs[head.expert_ids], is_unused[head.expert_ids]
    of_text = head.mask_padding(logs, head.expert_ids).masked_fill(is_unused, -torch.inf)
    added = (TEMPER * of_text).logsumexp(-1, keepdim=True) - of_text.logsumexp(-1, keepdim=True)  # by tempering
    log_prior = torch.where(is_unused, logs + added.nan_to_num(), TEMPER * logs)
    return log_prior - head.mask_padding(log_prior, head.expert_ids).logsumexp(-1, keepdim=True)


def _set_basis(
    packed: PackedRows,
    metric: Metric,
    rows_of: Callable[[slice], Tensor],
    weights: Tensor,
    dtype: torch.dtype,
    at_once: int = ROWS_AT_ONCE,
) -> Tensor:
    """Set the directions and quantisation steps of least weighted square error; see [`PackedRows`].

    Args:
        packed: its basis is set in place.
        metric: of the hidden states.
        rows_of: the rows of a slice of the first dimension, fp32 [n, ..., d].
        weights: of the rows, [M, ...].
        dtype: dtype that the basis is stored in.
        at_once: length of a slice.

    Returns:
        The projection from rows to coordinates in units of the steps, [d, r].
    """
    moment = torch.zeros_like(metric.root)
    parts = _slices(len(weights), at_once)
    every = -(-weights.numel() // ROWS_FOR_STEPS)
    factors, weights_of_factors = [], []
    for some in parts:
        rows, row_weights = rows_of(some).flatten(0, -2), weights[some].flatten()
        moment.addmm_(rows.t(), rows * row_weights.unsqueeze(-1))
        factors.append(rows[::every])
        weights_of_factors.append(row_weights[::every])
    count = len(packed.basis)
    vectors = torch.linalg.eigh(metric.root @ moment @ metric.root).eigenvectors.flip(-1)[:, :count]
    vectors = F.pad(vectors, (0, count - vectors.shape[1]))  # r can exceed d
    projection = metric.root @ vectors
    steps = _steps(torch.cat(factors) @ projection, torch.cat(weights_of_factors), packed.bits)
    packed.set_basis(steps.unsqueeze(-1) * vectors.t() @ metric.inverse_root, metric.mean, dtype)
    return projection / steps


def _slices(length: int, at_once: int) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, length, at_once))


def _steps(factors: Tensor, weights: Tensor, bits: Tensor) -> Tensor:
    """The quantisation step of each direction with the least weighted square error: factors [n, r] to [r]."""
    weights = weights / weights.sum()
    deviation = (weights @ factors.square()).sqrt().clamp_min(SMALLEST_SCALE)
    candidates = deviation * torch.tensor(STEPS_TRIED, device=factors.device).unsqueeze(-1)  # (tried, r)
    errors = [
        weights @ ((round_to_levels(factors / step, bits) + 0.5) * step - factors).square() for step in candidates
    ]
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    return candidates.gather(0, best).squeeze(0)
