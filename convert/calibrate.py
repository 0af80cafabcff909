"""The last step: how many experts it takes to agree with the dense head, on documents that were not distilled on."""

import math
import random
from dataclasses import dataclass

import torch
from scipy.stats import beta
from torch import Tensor
from torch.nn import functional as F

from hf_topk.errors import InputError, TopKExpertsError
from hf_topk.head import LOGITS_AT_ONCE, TopKExpertsHead
from hf_topk.measure.fidelity import Fidelity, measure_fidelity
from hf_topk.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.progress import progress
from hf_topk.text import Window

from .hidden_states import batches_of, states_of_batch

CONFIDENCE = 0.95
STATES_AT_ONCE = 256


class TargetNotReachedError(TopKExpertsError):
    """No number of experts that was allowed reaches the target agreement."""


@dataclass(frozen=True)
class Target:
    """What a conversion promises.

    Attributes:
        agreement: what the lower bound of the agreement is to reach, between 0 and 1.
        max_bytes_read: most bytes read for a position, as a share of the dense head's; None for no limit.
        or_nearest: whether to take what comes nearest where nothing reaches it.
    """

    agreement: float
    max_bytes_read: float | None = None
    or_nearest: bool = False


def split_by_document(windows: list[Window], held_out: float, seed: int) -> tuple[list[Window], list[Window]]:
    """Split windows into those to distil on and those to measure on, no document in both.

    A single document is split at the end of its first part instead.

    Args:
        windows: at least two.
        held_out: share of the documents to measure on; at least one document.
        seed: of the choice.

    Returns:
        Windows to distil on and windows to measure on, neither of them empty.

    Raises:
        InputError: when there is only one window.
    """
    if len(windows) < 2:
        raise InputError("the sample is a single window of tokens, which cannot be split: give more text")
    documents = sorted({window.document for window in windows})
    if len(documents) == 1:
        first = min(len(windows) - 1, max(1, round(len(windows) * (1 - held_out))))
        return windows[:first], windows[first:]
    count = min(len(documents) - 1, max(1, round(len(documents) * held_out)))
    chosen = set(random.Random(seed).sample(documents, count))
    return (
        [window for window in windows if window.document not in chosen],
        [window for window in windows if window.document in chosen],
    )


def lower_bound(agreement: float, positions: int) -> float:
    """One-sided 95 % Clopper-Pearson lower bound of an agreement.

    The exact bound for independent positions (Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404).

    Args:
        agreement: share of the positions that agreed.
        positions: number of positions measured.
    """
    agreed = round(agreement * positions)
    return float(beta.ppf(1 - CONFIDENCE, agreed, positions - agreed + 1)) if agreed else 0.0


def choose_num_experts(model: TopKExpertsForCausalLM, held_out: list[Window], target: Target) -> Fidelity | None:
    """Set k to the smallest number of experts whose agreement reaches the target with confidence.

    Args:
        model: the converted model; its k is set, to the fewest that come nearest if nothing reaches the target.
        held_out: windows of documents that the router has not seen.
        target: what to reach.

    Returns:
        What was measured at this k, or None if nothing was at the one that comes nearest.
    """
    dense, measured = rank_experts(model, held_out), dict[int, Fidelity]()

    def reaches(num_experts: int) -> bool:
        model.num_experts_per_tok = num_experts
        # The whole of the text is only read where this does not rule it out.
        if lower_bound(highest_agreement(model.head, dense), len(dense.best)) < target.agreement:
            return False
        measured[num_experts] = measure_fidelity(model, held_out)
        return lower_bound(measured[num_experts].agreement, len(dense.best)) >= target.agreement

    largest = _largest_allowed(model.head, target.max_bytes_read)
    shares = [float((dense.experts_needed <= k).double().mean()) for k in range(1, largest + 1)]
    bounds = (lower_bound(share, len(dense.best)) for share in shares)
    expected = next((k for k, bound in enumerate(bounds, 1) if bound >= target.agreement), largest)
    # What was expected is measured: the tail, too, has a say at rare positions.
    chosen = next((k for k in range(expected, largest + 1) if reaches(k)), 0)
    if not chosen:  # the fewest that do no worse than all that are allowed
        model.num_experts_per_tok = 1 + shares.index(shares[-1])
        return measured.get(model.head.num_experts_per_tok)
    while chosen > 1 and reaches(chosen - 1):
        chosen -= 1
    model.num_experts_per_tok = chosen
    return measured[chosen]


@dataclass(frozen=True)
class DenseChoices:
    """What the dense head chooses at each position, read once for every k.

    Attributes:
        states: hidden states, [N, d].
        best: the dense argmax, int64 [N].
        experts_needed: how many experts have to be scored for it to be among them, from 1 to M, and 0 where it is
            always on: int64 [N].
    """

    states: Tensor
    best: Tensor
    experts_needed: Tensor


@torch.inference_mode()
def rank_experts(model: TopKExpertsForCausalLM, windows: list[Window]) -> DenseChoices:
    """Find the dense argmax at each position, and where the router puts its expert.

    Args:
        model: the converted model.
        windows: runs of token ids; each token is one position.
    """
    head = model.head
    expert_of = torch.full((head.out_features,), -1, device=head.expert_ids.device)
    expert_of[head.expert_ids] = torch.arange(head.num_experts, device=expert_of.device).unsqueeze(-1)
    kept, best, needed = [], [], []
    total = sum(len(window.token_ids) for window in windows)
    with progress("Ranking the experts", total, "positions") as advance:
        for batch in batches_of(windows):
            states = states_of_batch(model.base, batch).to(head.weight.device)
            for some in states.split(STATES_AT_ONCE):
                some_best = argmax(F.linear(some, head.weight, head.bias))
                scores, expert = head.router(some), expert_of[some_best].unsqueeze(-1)
                rank = (scores > scores.gather(1, expert.clamp_min(0))).sum(dim=-1)
                needed.append(torch.where(expert.squeeze(-1) < 0, 0, rank + 1))
                best.append(some_best)
            kept.append(states)
            advance(len(states))
    return DenseChoices(torch.cat(kept), torch.cat(best), torch.cat(needed))


@torch.inference_mode()
def highest_agreement(head: TopKExpertsHead, dense: DenseChoices) -> float:
    """The agreement at the head's k if the tail outbids no token that is scored; it is this or a little lower.

    Args:
        head: the sparse head.
        dense: what the dense head chooses.
    """
    is_covered = dense.experts_needed <= head.num_experts_per_tok
    others, agreed = ~is_covered, int(is_covered.sum())
    for states, best in zip(
        dense.states[others].split(STATES_AT_ONCE), dense.best[others].split(STATES_AT_ONCE), strict=True
    ):
        agreed += int((argmax(head.sparse_logits(states)) == best).sum())
    return agreed / len(dense.best)


def argmax(logits: Tensor) -> Tensor:
    """Where each row is largest: [N, V] to int64 [N]. In fp32, block by block, three times as fast as in bfloat16."""
    blocks = logits.split(max(1, LOGITS_AT_ONCE // logits.shape[-1]))
    return torch.cat([block.float().argmax(dim=-1) for block in blocks])


def is_reached(fidelity: Fidelity, target: Target) -> bool:
    """Whether the agreement's lower bound reaches a target within its bytes.

    Args:
        fidelity: measured on held-out documents.
        target: what the model was to reach.
    """
    bound = lower_bound(fidelity.agreement, fidelity.positions)
    return bound >= target.agreement and fidelity.bytes_read <= (target.max_bytes_read or math.inf)


def check_target(fidelity: Fidelity, target: Target, num_experts_per_tok: int) -> None:
    """Refuse a model that falls short of its target, unless the nearest was to be taken.

    Args:
        fidelity: measured on held-out documents.
        target: what the model was to reach.
        num_experts_per_tok: k.

    Raises:
        TargetNotReachedError: when the lower bound of the agreement is below the target or too many bytes are read.
    """
    if target.or_nearest or is_reached(fidelity, target):
        return
    bound = lower_bound(fidelity.agreement, fidelity.positions)
    within = "" if target.max_bytes_read is None else f" within {target.max_bytes_read:.1%} of the bytes"
    raise TargetNotReachedError(
        f"the target agreement of {target.agreement} is not reached{within}: its lower bound is {bound:.4f} (agreement "
        f"{fidelity.agreement:.4f} on {fidelity.positions:,} held-out positions) at num_experts_per_tok "
        f"{num_experts_per_tok}, which reads {fidelity.bytes_read:.1%}; lower the target, allow more bytes, give a "
        "larger sample, or take this with --allow-below-target"
    )


def _largest_allowed(head: TopKExpertsHead, max_bytes_read: float | None) -> int:
    """The largest k within a limit of bytes read; 1 if there is none."""
    if max_bytes_read is None:
        return head.num_experts
    limit = max_bytes_read * head.dense_bytes()
    return max((k for k in range(1, head.num_experts + 1) if head.bytes_read(k) <= limit), default=1)
