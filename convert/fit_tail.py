"""Fits what gives unscored tokens their probability, and what combines it with the scored ones."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_topk.head import TopKExpertsHead
from hf_topk.progress import Advance, progress
from hf_topk.tails import LowRankTail, PriorTail

from .distill import STATES_FOR_STATISTICS, evenly_spaced

SMALLEST_PROBABILITY = 1e-12
SMALLEST_SCALE = 1e-30
COMBINER_STEPS = 200
COMBINER_BATCH = 32
COMBINER_LEARNING_RATE = 0.02


@torch.no_grad()
def fit_tail(head: TopKExpertsHead, states: Tensor, probabilities: Tensor) -> None:
    """Set the head's tail, if it has one.

    Args:
        head: its tail is set in place.
        states: hidden states, [N, d].
        probabilities: mean probability of each token over the sample, fp32 [V].
    """
    if isinstance(head.tail, PriorTail):
        head.tail.log_prior.copy_(probabilities.clamp_min(SMALLEST_PROBABILITY).log()[head.expert_ids])
    elif isinstance(head.tail, LowRankTail):
        sample = evenly_spaced(states, STATES_FOR_STATISTICS)
        _fit_low_rank(head, head.tail, sample.to(head.weight.device, torch.float32))


def _fit_low_rank(head: TopKExpertsHead, tail: LowRankTail, states: Tensor) -> None:
    """Data-weighted SVD of the rows less their expert's mean, which the router's score stands for."""
    mean = states.mean(dim=0)
    root, inverse_root = _square_roots((states - mean).t() @ (states - mean) / len(states))
    with progress("Fitting the tail", 2 * head.num_experts, "experts") as advance:
        vectors = _leading_directions(head, root, tail.basis.shape[0], advance)
        tail.basis.copy_(vectors.t() @ inverse_root)
        tail.center.copy_(tail.basis.float() @ mean)
        for expert, ids in enumerate(head.expert_ids):
            rows = _centred_rows(head, ids)
            factors = rows @ root @ vectors  # (S, r)
            tail.scales[expert] = factors.abs().amax(dim=-1).clamp_min(SMALLEST_SCALE) / 127.0
            tail.factors[expert] = (factors / tail.scales[expert].float().unsqueeze(-1)).round().clamp(-127, 127)
            bias = rows @ mean + (0.0 if head.bias is None else head.bias[ids].float())
            tail.bias[expert] = bias - bias.mean()
            advance()


def _leading_directions(head: TopKExpertsHead, root: Tensor, rank: int, advance: Advance) -> Tensor:
    """The first right singular vectors of (rows - expert means) root, from their second moment: [d, rank]."""
    moment = torch.zeros_like(root)
    for ids in head.expert_ids:
        rows = _centred_rows(head, ids) @ root
        moment += rows.t() @ rows
        advance()
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :rank]
    return F.pad(vectors, (0, rank - vectors.shape[1]))  # a head can be narrower than the rank


def _centred_rows(head: TopKExpertsHead, ids: Tensor) -> Tensor:
    rows = head.weight[ids].float()
    return rows - rows.mean(dim=0)


def _square_roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a covariance and its inverse, [d, d] each."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(values[-1].clamp_min(SMALLEST_SCALE) * 1e-6)  # flat directions
    return vectors * values.sqrt() @ vectors.t(), vectors / values.sqrt() @ vectors.t()


def fit_combiner(head: TopKExpertsHead, states: Tensor, seed: int) -> None:
    """Distil the combiner of a head that has one: the least KL divergence from the dense distribution.

    Args:
        head: its combiner is trained in place.
        states: hidden states, [N, d].
        seed: of the order of positions.
    """
    if head.combine != "learned":
        return
    generator = torch.Generator().manual_seed(seed)
    head.requires_grad_(False)
    parameters = list(head.combiner.requires_grad_().parameters())
    optimizer = torch.optim.Adam(parameters, lr=COMBINER_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, COMBINER_STEPS)
    with torch.enable_grad(), progress("Distilling the combiner", COMBINER_STEPS, "steps") as advance:
        for _ in range(COMBINER_STEPS):
            chosen = torch.randint(states.shape[0], (COMBINER_BATCH,), generator=generator)
            hidden = states[chosen].to(head.weight)
            dense = F.linear(hidden, head.weight, head.bias).float().log_softmax(-1)
            sparse = head.sparse_logits(hidden).float().log_softmax(-1)
            F.kl_div(sparse, dense, log_target=True, reduction="batchmean").backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance()
