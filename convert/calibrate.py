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


def choose_num_experts(model: TopKExpertsForCausalLM, held_out: list[Window], target: Target) -> None:
    """Set k to the smallest number of experts whose agreement reaches the target with confidence.

    Args:
        model: the converted model; its k is set, to the fewest that come nearest if nothing reaches the target.
        held_out: windows of documents that the router has not seen.
        target: what to reach.
    """

    def reaches(num_experts: int) -> bool:
        set_num_experts(model, num_experts)
        fidelity = measure_fidelity(model, held_out)
        return lower_bound(fidelity.agreement, fidelity.positions) >= target.agreement

    largest = _largest_allowed(model.head, target.max_bytes_read)
    needed = experts_needed(model, held_out)
    shares = [float((needed <= k).double().mean()) for k in range(1, largest + 1)]
    expected = next((k for k, share in enumerate(shares, 1) if lower_bound(share, len(needed)) >= target.agreement), 0)
    if not expected:  # the fewest that do no worse than all that are allowed
        set_num_experts(model, 1 + shares.index(shares[-1]))
        return
    # What was expected is measured: the tail, too, has a say at rare positions.
    chosen = next((k for k in range(expected, largest + 1) if reaches(k)), largest)
    while chosen > 1 and reaches(chosen - 1):
        chosen -= 1
    set_num_experts(model, chosen)


def set_num_experts(model: TopKExpertsForCausalLM, num_experts: int) -> None:
    """Set k of a model in memory and in its configuration."""
    model.head.num_experts_per_tok = model.config.num_experts_per_tok = num_experts


@torch.inference_mode()
def experts_needed(model: TopKExpertsForCausalLM, windows: list[Window]) -> Tensor:
    """How many experts have to be scored at each position for the dense argmax to be among them.

    Args:
        model: the converted model.
        windows: runs of token ids; each token is one position.

    Returns:
        Numbers from 1 to M, and 0 where the dense argmax is always on: int64 [N].
    """
    head = model.head
    expert_of = torch.full((head.out_features,), -1, device=head.expert_ids.device)
    expert_of[head.expert_ids] = torch.arange(head.num_experts, device=expert_of.device).unsqueeze(-1)
    needed = []
    total = sum(len(window.token_ids) for window in windows)
    with progress("Ranking the experts", total, "positions") as advance:
        for batch in batches_of(windows):
            states = states_of_batch(model.base, batch).to(head.weight.device)
            for some in states.split(max(1, LOGITS_AT_ONCE // head.out_features)):
                expert = expert_of[F.linear(some, head.weight, head.bias).argmax(dim=-1, keepdim=True)]
                scores = head.router(some)
                rank = (scores > scores.gather(1, expert.clamp_min(0))).sum(dim=-1)
                needed.append(torch.where(expert.squeeze(-1) < 0, 0, rank + 1).cpu())
            advance(len(states))
    return torch.cat(needed)


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
