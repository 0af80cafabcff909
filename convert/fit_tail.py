"""Fits what gives unscored tokens their probability, and what combines it with the scored ones."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_topk.head import TopKExpertsHead
from hf_topk.kernels import pack
from hf_topk.progress import Advance, progress
from hf_topk.tails import LowRankTail, PriorTail, ScreenTail

from .distill import STATES_FOR_STATISTICS, evenly_spaced, without_repeats

SMALLEST_PROBABILITY = 1e-12
SMALLEST_SCALE = 1e-30
EXPERTS_FOR_STEPS = 64
EXPERTS_AT_ONCE = 16
STEPS_TRIED = (0.25, 0.3, 0.35, 0.4, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)  # in standard deviations
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
    if isinstance(head.tail, PriorTail | ScreenTail):
        prior = probabilities.clamp_min(SMALLEST_PROBABILITY).log()
        for expert, ids in enumerate(without_repeats(head.expert_ids)):
            head.tail.log_prior[expert] = prior[head.expert_ids[expert]] - prior[ids].logsumexp(dim=0)
    if isinstance(head.tail, LowRankTail):
        sample = evenly_spaced(states, STATES_FOR_STATISTICS)
        _fit_low_rank(head, head.tail, sample.to(head.weight.device, torch.float32), probabilities)


def _fit_low_rank(head: TopKExpertsHead, tail: LowRankTail, states: Tensor, probabilities: Tensor) -> None:
    """Data-weighted SVD of the rows less their expert's mean, which the router's score stands for."""
    mean = states.mean(dim=0)
    root, inverse_root = _square_roots((states - mean).t() @ (states - mean) / len(states))
    bits = torch.tensor([4] * tail.directions_4bit + [2] * (len(tail.basis) - tail.directions_4bit), device=root.device)
    with progress("Fitting the tail", 2 * head.num_experts, "experts") as advance:
        vectors = _leading_directions(head, root, probabilities, len(bits), advance)
        some = head.expert_ids[:: max(1, head.num_experts // EXPERTS_FOR_STEPS)]
        projection = root @ vectors
        factors = torch.cat([_centred_rows(head, ids) for ids in some]) @ projection
        steps = _steps(factors, probabilities[some.flatten()], bits)
        basis = steps.unsqueeze(-1) * vectors.t() @ inverse_root
        tail.basis.copy_(basis)
        tail.center.copy_(basis @ mean)
        for expert, ids in enumerate(head.expert_ids):
            rows = _centred_rows(head, ids)
            # From zero up: what that adds is the same for all tokens, and goes when they are normalised.
            codes = (_levels(rows @ projection / steps, bits) + 2 ** (bits - 1)).to(torch.uint8)  # (S, r)
            first, others = codes.split([tail.directions_4bit, len(bits) - tail.directions_4bit], dim=-1)
            tail.codes_4bit[expert], tail.codes_2bit[expert] = pack(first, 4), pack(others, 2)
            bias = rows @ mean + (0.0 if head.bias is None else head.bias[ids].float())
            tail.bias[expert] = bias - bias.mean()
            advance()


def _leading_directions(
    head: TopKExpertsHead, root: Tensor, probabilities: Tensor, count: int, advance: Advance
) -> Tensor:
    """The first right singular vectors of (rows - expert means) root, likely rows weighing more: [d, count]."""
    moment = torch.zeros_like(root)
    for some in head.expert_ids.split(EXPERTS_AT_ONCE):
        rows = torch.cat([_centred_rows(head, ids) for ids in some])
        moment.addmm_(rows.t(), rows * probabilities[some.flatten()].unsqueeze(-1))
        advance(len(some))
    vectors = torch.linalg.eigh(root @ moment @ root).eigenvectors.flip(-1)[:, :count]
    return F.pad(vectors, (0, count - vectors.shape[1]))  # a head can be narrower than that


def _levels(values: Tensor, bits: Tensor) -> Tensor:
    """The whole numbers n for which n + 1/2 is nearest to values in steps, from -2^(bits - 1) to 2^(bits - 1) - 1."""
    return values.floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _steps(factors: Tensor, weights: Tensor, bits: Tensor) -> Tensor:
    """The step of each direction that rounds its factors with the least square error, weighted: [n, r] to [r]."""
    weights = weights.clamp_min(SMALLEST_PROBABILITY)  # where always-on tokens have it all
    weights = weights / weights.sum()
    deviation = (weights @ factors.square()).sqrt().clamp_min(SMALLEST_SCALE)
    candidates = deviation * torch.tensor(STEPS_TRIED, device=factors.device).unsqueeze(-1)  # (tried, r)
    errors = [weights @ ((_levels(factors / step, bits) + 0.5) * step - factors).square() for step in candidates]
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    return candidates.gather(0, best).squeeze(0)


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
