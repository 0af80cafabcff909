"""The last step: choose k and R, the operating point, by the agreement with the dense head on held-out documents."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hf_topk.evaluation.fidelity import Fidelity
from hf_topk.model.errors import TopKExpertsError
from hf_topk.model.head import SCORED_AT_ONCE, TopKExpertsHead
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.model.token_chooser import likeliest
from hf_topk.progress import progress

from ..recipe import TARGET_AGREEMENT, Recipe
from .held_out import DenseArgmax

ESTIMATES_AT_ONCE = 1 << 22
GROWTH = 1.15  # ratio of one k tried, or one R tried, to the one before
FEWEST_RESCORED = 16
# Without a target, the screen may lose the dense argmax at no more than this share of the positions.
LOST_TO_SCREEN = 0.001


class TargetNotReachedError(TopKExpertsError):
    """No allowed operating point reaches the target agreement."""


@dataclass(frozen=True)
class Target:
    """The agreement that a conversion has to reach.

    Attributes:
        agreement: what [`DenseArgmax.reached`] has to be on held-out documents, between 0 and 1.
        max_bytes_read: the most bytes to read per position, as a share of the dense head's; None for no limit.
        or_nearest: whether to take the nearest operating point if none reaches it.
    """

    agreement: float
    max_bytes_read: float | None = None
    or_nearest: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The target of a recipe; the default, or the nearest to it, where the recipe names none."""
        is_named = recipe.target_agreement is not None
        agreement = recipe.target_agreement if recipe.target_agreement is not None else TARGET_AGREEMENT
        return cls(agreement, recipe.max_bytes_read, recipe.allow_below_target or not is_named)


@dataclass(frozen=True)
class OperatingPoint:
    """A choice of k and R.

    Attributes:
        num_experts_per_tok: k, experts picked per position.
        num_rescored: R, exact logits per position.
    """

    num_experts_per_tok: int
    num_rescored: int

    def apply(self, model: TopKExpertsForCausalLM) -> None:
        """Set a converted model's k and R."""
        model.config.num_experts_per_tok, model.config.num_rescored = self.num_experts_per_tok, self.num_rescored

    def share_of_bytes(self, head: TopKExpertsHead) -> float:
        """Set a head's k and R; return the bytes it then reads per position, as a share of the dense head's."""
        head.num_experts_per_tok, head.num_rescored = self.num_experts_per_tok, self.num_rescored
        return head.bytes_read() / head.dense_bytes()


@dataclass(frozen=True)
class ArgmaxRanks:
    """The screen's rank of the dense argmax at each position, for each k tried.

    Attributes:
        tried: values of k, ascending, up to M.
        ranks: number of tokens of the k best experts that the screen scores above the dense argmax, int64 [N, tried];
            -1 if the argmax is an always-on token, the largest int64 if it is in none of the k experts.
    """

    tried: list[int]
    ranks: Tensor

    def part(self, is_kept: Tensor) -> "ArgmaxRanks":
        """The positions where `is_kept`, bool [N], is true."""
        return ArgmaxRanks(self.tried, self.ranks[is_kept])

    def agrees(self, which: int, num_rescored: int) -> Tensor:
        """Whether the dense argmax gets an exact logit, bool [N].

        Args:
            which: index into `tried`.
            num_rescored: R.
        """
        return self.ranks[:, which] < num_rescored


@torch.inference_mode()
def rank_argmax(head: TopKExpertsHead, dense: DenseArgmax, k: int = 1) -> ArgmaxRanks:
    """Rank the dense argmax among the tokens of the k best experts, for many k at once.

    Args:
        head: the sparse head.
        dense: the dense argmax of each position.
        k: a value to try besides the usual ones.
    """
    slots = torch.arange(head.expert_ids.numel(), device=head.expert_ids.device)
    slot_of = torch.full((head.out_features,), len(slots), device=slots.device)
    slot_of = slot_of.scatter_reduce(
        0, head.expert_ids.flatten(), slots, "amin"
    )  # padding repeats an id: take the first
    slot_of = slot_of.masked_fill(slot_of == len(slots), -1)
    tried, ranks = sorted({*_growing(1, head.num_experts), k, head.num_experts}), []
    at_once = max(1, ESTIMATES_AT_ONCE // head.out_features)
    with progress("Ranking the tokens", len(dense.states), "positions") as advance:
        for states, best in zip(dense.states.split(at_once), dense.best.split(at_once), strict=True):
            ranks.append(_ranks(head, states, slot_of[best], torch.tensor(tried, device=best.device)))
            advance(len(states))
    return ArgmaxRanks(tried, torch.cat(ranks))


def _ranks(head: TopKExpertsHead, states: Tensor, slots: Tensor, tried: Tensor) -> Tensor:
    """Ranks of the tokens in the given slots of the experts, -1 for always-on ones: int64 [n] to [n, tried]."""
    scores = head.router(states)
    within = head.tail.products(states)
    within = head.mask_padding(within, head.expert_ids)
    estimates = within - within.logsumexp(dim=-1, keepdim=True) + scores.unsqueeze(-1)  # (n, M, S)
    own = estimates.flatten(1).gather(1, slots.clamp_min(0).unsqueeze(-1)).unsqueeze(-1)
    before = (estimates > own).sum(dim=-1)  # (n, M)
    order = scores.argsort(dim=-1, descending=True)
    ranks = before.gather(1, order).cumsum(dim=-1)[:, tried - 1]
    position = (order == (slots // head.expert_size).unsqueeze(-1)).int().argmax(dim=-1, keepdim=True)
    ranks = ranks.masked_fill(position >= tried, torch.iinfo(torch.long).max)
    return ranks.masked_fill((slots < 0).unsqueeze(-1), -1)


def numbers_rescored(most: int) -> list[int]:
    """Values of R to try, ascending.

    Args:
        most: k S, the tokens of all picked experts.
    """
    return [*_growing(FEWEST_RESCORED, most - 1), most]


def _growing(first: int, last: int) -> Iterator[int]:
    number = first
    while number <= last:
        yield number
        number = max(number + 1, round(number * GROWTH))


def choose_operating_point(
    model: TopKExpertsForCausalLM, dense: DenseArgmax, ranks: ArgmaxRanks, target: Target
) -> Tensor:
    """Set k and R to the operating point that reads the fewest bytes among those that reach the target.

    Args:
        model: the converted model; its k and R are set, to the nearest operating point if none reaches the target.
        dense: the dense argmax on documents that the router was not distilled on.
        ranks: of this argmax; see [`rank_argmax`].
        target: the agreement to reach.

    Returns:
        Whether the sparse argmax is then the dense argmax, bool [N].
    """
    wanted = target.agreement
    for expected, setting in _cheapest_first(model, dense, ranks, target):
        if expected < wanted:
            continue
        setting.apply(model)
        agreed = agrees(model.head, dense)
        reached = dense.reached(agreed)
        if reached >= target.agreement:
            return agreed
        # The ranks do not show the rare positions where the tail outscores the exact logits: ask for as many more.
        while wanted <= expected:
            wanted += max(target.agreement - reached, 1 / len(dense.best))
    _nearest(model, dense, ranks, target).apply(model)
    return agrees(model.head, dense)


def fewest_bytes(
    model: TopKExpertsForCausalLM, dense: DenseArgmax, ranks: ArgmaxRanks, target: Target
) -> tuple[float, float]:
    """What [`choose_operating_point`] can expect, to compare heads by: the larger, the better.

    Args:
        model: the converted model.
        dense: the dense argmax on documents that the router was not distilled on.
        ranks: of this argmax.
        target: the agreement to reach.

    Returns:
        The agreement that is reached, at most the target, and the negative share of bytes that this takes.
    """
    for expected, setting in _cheapest_first(model, dense, ranks, target):
        if expected >= target.agreement:
            return target.agreement, -setting.share_of_bytes(model.head)
    nearest = _nearest(model, dense, ranks, target)
    which = ranks.tried.index(nearest.num_experts_per_tok)
    reached = dense.reached(ranks.agrees(which, nearest.num_rescored))
    return reached, -nearest.share_of_bytes(model.head)


def _cheapest_first(
    model: TopKExpertsForCausalLM, dense: DenseArgmax, ranks: ArgmaxRanks, target: Target
) -> Iterator[tuple[float, OperatingPoint]]:
    """Yield all affordable operating points with the target that each is expected to reach, by bytes."""
    for _, which, setting in sorted(_affordable(model, ranks, target), key=lambda one: one[0]):
        yield dense.reached(ranks.agrees(which, setting.num_rescored)), setting


def _affordable(
    model: TopKExpertsForCausalLM, ranks: ArgmaxRanks, target: Target
) -> Iterator[tuple[float, int, OperatingPoint]]:
    """Yield share of bytes, index of k and operating point of all that keep to the target's limit of bytes."""
    for which, k in enumerate(ranks.tried):
        for rescored in numbers_rescored(k * model.head.expert_size):
            setting = OperatingPoint(k, rescored)
            if (share := setting.share_of_bytes(model.head)) <= (target.max_bytes_read or math.inf):
                yield share, which, setting


def _nearest(model: TopKExpertsForCausalLM, dense: DenseArgmax, ranks: ArgmaxRanks, target: Target) -> OperatingPoint:
    """The cheapest operating point whose agreement, not its lower bound, reaches the target; else the best one."""
    best, nearest = (-1.0, 0.0), OperatingPoint(1, FEWEST_RESCORED)
    for share, which, setting in _affordable(model, ranks, target):
        key = min(target.agreement, dense.agreement(ranks.agrees(which, setting.num_rescored))), -share
        best, nearest = max((best, nearest), (key, setting), key=lambda one: one[0])
    return nearest


def choose_num_rescored(model: TopKExpertsForCausalLM, dense: DenseArgmax) -> None:
    """Set R, at the model's own k, to the least value at which the screen loses at most 0.1 % of the positions.

    Args:
        model: the converted model; R is set.
        dense: the dense argmax on documents that the router was not distilled on.
    """
    k = model.head.num_experts_per_tok
    ranks = rank_argmax(model.head, dense, k)
    which = ranks.tried.index(k)
    most = ranks.tried[which] * model.head.expert_size
    wanted = float(ranks.agrees(which, most).double().mean()) - LOST_TO_SCREEN
    for rescored in numbers_rescored(most):
        OperatingPoint(k, rescored).apply(model)
        if float(ranks.agrees(which, rescored).double().mean()) >= wanted:
            return


@torch.inference_mode()
def agrees(head: TopKExpertsHead, dense: DenseArgmax) -> Tensor:
    """Whether the sparse argmax, at the head's k and R, is the dense argmax: bool [N].

    Args:
        head: the sparse head.
        dense: the dense argmax of each position.
    """
    chosen = [likeliest(head, head.score(states)) for states in dense.states.split(SCORED_AT_ONCE)]
    return torch.cat(chosen) == dense.best


def is_reached(reached: float, bytes_read: float, target: Target) -> bool:
    """Whether a target is reached within its limit of bytes.

    Args:
        reached: on held-out documents, by [`DenseArgmax.reached`].
        bytes_read: share of the dense head's.
        target: of the conversion.
    """
    return reached >= target.agreement and bytes_read <= (target.max_bytes_read or math.inf)


def check_target(
    reached: float, fidelity: Fidelity, by_kind: dict[str, float], target: Target, num_experts_per_tok: int
) -> None:
    """Refuse a model that misses its target, unless the target allows the nearest.

    Args:
        reached: on held-out documents, by [`DenseArgmax.reached`].
        fidelity: measured on the same documents.
        by_kind: the agreement on each kind of their text.
        target: of the conversion.
        num_experts_per_tok: k.

    Raises:
        TargetNotReachedError: when it does.
    """
    if target.or_nearest or is_reached(reached, fidelity.bytes_read, target):
        return
    within = "" if target.max_bytes_read is None else f" within {target.max_bytes_read:.1%} of the bytes"
    worst = min(by_kind, key=by_kind.__getitem__, default="")
    of_kind = f", {by_kind[worst]:.4f} on its {worst}" if len(by_kind) > 1 else ""
    raise TargetNotReachedError(
        f"the target agreement of {target.agreement} is not reached{within}: its lower bound is "
        f"{fidelity.agreement_lower_bound:.4f} (agreement {fidelity.agreement:.4f} on {fidelity.positions:,} held-out "
        f"positions{of_kind}) at num_experts_per_tok {num_experts_per_tok}, which reads {fidelity.bytes_read:.1%}; "
        "lower the target, allow more bytes, give more calibration text, or accept this with --allow-below-target"
    )
