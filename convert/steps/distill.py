"""Distillation: the router learns the dense head's mass over experts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_topk.compute_dtype import faster_dtype
from hf_topk.model.head import TopKExpertsHead
from hf_topk.model.joint_training import LEVEL_WEIGHT, divergence
from hf_topk.model.router import Router
from hf_topk.progress import progress

ROWS_AT_ONCE = 4096  # rows of the head per block
STATES_AT_ONCE = 1024
LOGIT_BYTES_AT_ONCE = 2**28
STATES_FOR_STATISTICS = 16_384  # enough for token probabilities and the states' covariance
STATISTICS_FLOPS, FEWEST_FOR_STATISTICS = (
    1.5e12,
    4096,
)  # limits the work on large heads, where fewer states do nearly as well
CONTEXT_DIRECTIONS = 64  # leading directions of the states; k-means finds no better experts with more
RIDGE = 3e-3  # relative to the mean of the diagonal; from a tenth to three times this does as well


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of each token over a sample of the positions, on the head's device.

    Attributes:
        probabilities: mean probability, fp32 [V]; they sum to 1.
        contexts: mean hidden state weighted by the token's probability, sum_n p(v | h_n) h_n / sum_n p(v | h_n), in the
            dtype of the head: [V, d], or [V, 64] in the leading directions of the states if d is larger.
    """

    probabilities: Tensor
    contexts: Tensor


@torch.no_grad()
def token_statistics(states: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStatistics:
    """Compute probabilities and contexts of all tokens in one pass over a sample of the states.

    Args:
        states: hidden states, [N, d].
        weight: W, [V, d].
        bias: [V] or None.
    """
    count = max(FEWEST_FOR_STATISTICS, int(STATISTICS_FLOPS / (2.0 * weight.numel())))
    sample = evenly_spaced(states, min(STATES_FOR_STATISTICS, count)).to(weight.device)
    projected = _in_leading_directions(sample.float())
    # A context is a softmax over positions. As an online softmax, block by block, it does not underflow for rare tokens
    # (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).
    tops = torch.full((weight.shape[0],), -torch.inf, device=weight.device)
    sums, contexts = torch.zeros_like(tops), projected.new_zeros(len(tops), projected.shape[1])
    dtype = faster_dtype(weight.dtype, weight.device)
    at_once = max(1, LOGIT_BYTES_AT_ONCE // (weight.shape[0] * dtype.itemsize))
    with progress("Reading token statistics", len(sample), "positions") as advance:
        for some, coordinates in zip(sample.split(at_once), projected.split(at_once), strict=True):
            logits = _logits(some, weight, bias, dtype)  # (n, V)
            log_sums = [_log_sums(part.to(torch.float32, copy=True)) for part in logits.split(ROWS_AT_ONCE, dim=-1)]
            total = torch.stack(log_sums, dim=-1).logsumexp(dim=-1, keepdim=True)
            for start in range(0, len(tops), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                log_probabilities = logits[:, rows].float().sub_(total)
                top = torch.maximum(tops[rows], log_probabilities.amax(dim=0))
                shares, shrink = log_probabilities.sub_(top).exp_(), (tops[rows] - top).exp_()
                contexts[rows] = torch.addmm(contexts[rows] * shrink.unsqueeze(-1), shares.t(), coordinates)
                sums[rows] = sums[rows] * shrink + shares.sum(dim=0)
                tops[rows] = top
            del logits  # frees them before the next block is allocated
            advance(len(some))
    probabilities = (tops + sums.log() - math.log(len(sample))).exp_()
    return TokenStatistics(probabilities, contexts.div_(sums.unsqueeze(-1)).to(weight.dtype))


def _in_leading_directions(states: Tensor) -> Tensor:
    """The 64 leading principal components of the states, [N, d] to [N, 64]; the states themselves if d is no larger."""
    if states.shape[1] <= CONTEXT_DIRECTIONS:
        return states
    states = states - states.mean(dim=0)
    return states @ torch.linalg.eigh(states.t() @ states).eigenvectors[:, -CONTEXT_DIRECTIONS:]


@torch.no_grad()
def expert_masses(states: Tensor, weight: Tensor, bias: Tensor | None, groups: list[Tensor]) -> Tensor:
    """Compute the targets of the router: the log-sum-exp of the dense logits of each group of tokens.

    Args:
        states: hidden states, [N, d].
        weight: W, [V, d].
        bias: [V] or None.
        groups: token ids of each group, without repeats.

    Returns:
        The masses of the groups, in RAM, fp32 [N, number of groups].
    """
    masses, dtype = torch.empty(states.shape[0], len(groups)), faster_dtype(weight.dtype, weight.device)
    with progress("Reading the experts' masses", len(groups), "experts") as advance:
        for first, block in _blocks_of_groups(groups):
            ids = torch.cat(block)
            rows, row_bias = weight[ids], None if bias is None else bias[ids]
            sizes = [len(group) for group in block]
            for start in range(0, states.shape[0], STATES_AT_ONCE):
                some = slice(start, start + STATES_AT_ONCE)
                logits = _logits(states[some].to(weight.device), rows, row_bias, dtype).float()
                masses[some, first : first + len(block)] = _segment_log_sums(logits, sizes)
            advance(len(block))
    return masses


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _segment_log_sums(logits: Tensor, sizes: list[int]) -> Tensor:
    """Log-sum-exp of runs of columns, [N, runs]; overwrites the logits."""
    if len(set(sizes)) == 1:
        return _log_sums(logits.unflatten(-1, (len(sizes), sizes[0])))
    return torch.stack([_log_sums(part) for part in logits.split(sizes, dim=-1)], dim=-1)


def _log_sums(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, in place: three times as fast as `logsumexp`, which makes large copies."""
    top = logits.amax(dim=-1, keepdim=True)
    return logits.sub_(top).exp_().sum(dim=-1).log_().add_(top.squeeze(-1))


def _blocks_of_groups(groups: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield blocks of groups with about ROWS_AT_ONCE tokens in all, each with the index of its first group."""
    first, size = 0, 0
    for number, group in enumerate(groups):
        if size and size + len(group) > ROWS_AT_ONCE:
            yield first, groups[first:number]
            first, size = number, 0
        size += len(group)
    yield first, groups[first:]


def evenly_spaced(states: Tensor, count: int) -> Tensor:
    """Evenly spaced states, at most `count` of them: [N, d] to [at most count, d]."""
    step = max(1, -(-states.shape[0] // count))
    return states[::step]


def groups_of(head: TopKExpertsHead) -> list[Tensor]:
    """Token ids of each expert without its padding and, as the last group, the always-on ids if there are any."""
    groups = without_repeats(head.expert_ids)
    return [*groups, head.always_on_ids] if head.num_always_on else groups


def without_repeats(expert_ids: Tensor) -> list[Tensor]:
    """Token ids of each expert, [M, S], without the padding, which repeats its first id."""
    return [ids[: 1 + int((ids[1:] != ids[0]).sum())] for ids in expert_ids]


@torch.no_grad()
def start_router(router: Router, states: Tensor, masses: Tensor) -> None:
    """Initialise the router with the ridge regression of the experts' masses on the hidden states.

    On a tenth of the states it ranks experts better than gradient descent from the experts' mean rows does on all.

    Args:
        router: its rows and bias are set in place.
        states: hidden states, [N, d].
        masses: targets of the router, fp32 [N, M]; further columns are ignored.
    """
    device, num_experts = router.bias.device, router.bias.shape[0]
    size = states.shape[1]
    gram, cross = torch.zeros(size, size, device=device), torch.zeros(size, num_experts, device=device)
    mean, mean_mass = states.float().mean(dim=0).to(device), masses[:, :num_experts].mean(dim=0).to(device)
    for some, target in zip(states.split(STATES_AT_ONCE), masses.split(STATES_AT_ONCE), strict=True):
        centred = some.to(device).float() - mean
        gram.addmm_(centred.t(), centred)
        cross.addmm_(centred.t(), target[:, :num_experts].to(device) - mean_mass)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    rows = torch.linalg.solve(gram, cross).t()
    router.floats.copy_(rows)
    router.bias.copy_(mean_mass - rows @ mean)


def train_router(
    router: Router, states: Tensor, masses: Tensor, steps: int, batch_size: int, learning_rate: float, seed: int
) -> float:
    """Distil the dense head's distribution over experts into the router.

    The loss is the KL divergence of the router's from the dense head's distribution over experts and always-on tokens
    (Hinton et al. 2015, https://arxiv.org/abs/1503.02531), plus a small term that fixes the level of the scores, which
    the softmax leaves free.

    Args:
        router: trained in place.
        states: hidden states, [N, d].
        masses: targets of the router, fp32 [N, M], or [N, M + 1] with the mass of the always-on tokens last.
        steps: training steps.
        batch_size: positions per step.
        learning_rate: of Adam at the first step; decays to zero along a cosine.
        seed: of the random batches.

    Returns:
        The mean KL divergence over the last tenth of the steps, in nats.
    """
    scale = 1.0 / float(evenly_spaced(states, STATES_FOR_STATISTICS).float().square().mean().sqrt())
    _scale_inward(router, 1.0 / scale)  # one learning rate then suits states of any magnitude
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter.requires_grad_() for parameter in router.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    num_experts = router.bias.shape[0]
    with torch.enable_grad(), progress("Distilling the router", steps, "steps") as advance:
        for _ in range(steps):
            chosen = torch.randint(states.shape[0], (min(batch_size, states.shape[0]),), generator=generator)
            target = masses[chosen].to(router.bias)
            scores = router(states[chosen].to(target) * scale)
            predicted = torch.cat([scores, target[:, num_experts:]], dim=-1)
            terms, off = divergence(predicted, target)
            loss = terms.sum() / len(terms)
            (loss + LEVEL_WEIGHT * off.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            advance()
    _scale_inward(router, scale)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def _scale_inward(router: Router, factor: float) -> None:
    router.floats.mul_(factor)
