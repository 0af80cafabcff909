"""The last step: how many experts and exact logits it takes to agree with the dense head, on documents held out."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_topk.evaluation.confidence_bound import lower_bound
from hf_topk.evaluation.fidelity import Fidelity
from hf_topk.model.errors import InputError, TopKExpertsError
from hf_topk.model.head import LOGITS_AT_ONCE, SCORED_AT_ONCE, TopKExpertsHead
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.model.token_chooser import likeliest
from hf_topk.progress import progress
from hf_topk.windows import Window, batches_of

from ..recipe import TARGET_AGREEMENT, Recipe
from .hidden_states import states_of_batch

STATES_AT_ONCE = 256
ESTIMATES_AT_ONCE = 1 << 22
GROWTH = 1.15  # from one number of experts tried, or of exact logits, to the next
FEWEST_RESCORED = 16
# Where nothing is promised, at most this share of the positions may lose the dense argmax to the screen.
LOST_TO_SCREEN = 0.001


class TargetNotReachedError(TopKExpertsError):
    """No setting that was allowed reaches the target agreement."""


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

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """What a recipe promises, or comes as near to as it can where it names no target."""
        is_named = recipe.target_agreement is not None
        agreement = recipe.target_agreement if recipe.target_agreement is not None else TARGET_AGREEMENT
        return cls(agreement, recipe.max_bytes_read, recipe.allow_below_target or not is_named)


@dataclass(frozen=True)
class Setting:
    """Numbers of experts and exact logits.

    Attributes:
        num_experts_per_tok: k.
        num_rescored: R.
    """

    num_experts_per_tok: int
    num_rescored: int

    def apply(self, model: TopKExpertsForCausalLM) -> None:
        """Set a converted model's k and R."""
        model.config.num_experts_per_tok, model.config.num_rescored = self.num_experts_per_tok, self.num_rescored

    def share_of_bytes(self, head: TopKExpertsHead) -> float:
        """What a head reads for a position with this k and R, which are set, as a share of the dense head's bytes."""
        head.num_experts_per_tok, head.num_rescored = self.num_experts_per_tok, self.num_rescored
        return head.bytes_read() / head.dense_bytes()


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


@dataclass(frozen=True)
class DenseChoices:
    """What the dense head chooses at each position, read once for every setting.

    Attributes:
        states: hidden states, [N, d].
        best: the dense argmax, int64 [N].
        documents: number of the document that a position is in, from 0 up, int64 [N].
    """

    states: Tensor
    best: Tensor
    documents: Tensor

    def evenly_spaced(self, count: int) -> "DenseChoices":
        """The same at `count` positions or fewer."""
        is_kept = torch.zeros_like(self.best, dtype=torch.bool)
        is_kept[:: -(-len(self.best) // count)] = True
        return self.part(is_kept)

    def part(self, is_kept: Tensor) -> "DenseChoices":
        """The same at the positions where `is_kept`, bool [N], is true."""
        documents = self.documents[is_kept].unique(return_inverse=True)[1]
        return DenseChoices(self.states[is_kept], self.best[is_kept], documents)

    def bound(self, agrees: Tensor) -> float:
        """The lower bound of an agreement: bool [N]."""
        positions = self.documents.bincount()
        return lower_bound(self.documents[agrees].bincount(minlength=len(positions)).tolist(), positions.tolist())


@torch.inference_mode()
def dense_choices(model: TopKExpertsForCausalLM, windows: list[Window]) -> DenseChoices:
    """Run the dense model and find its argmax at each position.

    Args:
        model: the converted model.
        windows: runs of token ids; each token is one position.
    """
    head, kept, best = model.head, [], []
    numbers = {document: number for number, document in enumerate(dict.fromkeys(one.document for one in windows))}
    documents = [numbers[window.document] for window in windows for _ in window.token_ids]
    with progress("Running the dense model", len(documents), "positions") as advance:
        for batch in batches_of(windows):
            states = states_of_batch(model.base, batch).to(head.weight.device)
            best += [argmax(F.linear(some, head.weight, head.bias)) for some in states.split(STATES_AT_ONCE)]
            kept.append(states)
            advance(len(states))
    return DenseChoices(torch.cat(kept), torch.cat(best), torch.tensor(documents, device=best[0].device))


@dataclass(frozen=True)
class Reach:
    """Where the dense argmax stands at each position, for every number of experts that is tried.

    Attributes:
        tried: numbers of experts, ascending, up to M.
        ranks: how many tokens of the k best experts the screen puts before the dense argmax, for each number tried;
            -1 where it is always on, and above all where none of these experts has it: int64 [N, tried].
    """

    tried: list[int]
    ranks: Tensor

    def part(self, is_kept: Tensor) -> "Reach":
        """The same at the positions where `is_kept`, bool [N], is true."""
        return Reach(self.tried, self.ranks[is_kept])

    def agrees(self, which: int, num_rescored: int) -> Tensor:
        """Whether the dense argmax gets an exact logit, bool [N].

        Args:
            which: of the numbers of experts tried.
            num_rescored: R.
        """
        return self.ranks[:, which] < num_rescored


@torch.inference_mode()
def reach(head: TopKExpertsHead, dense: DenseChoices, k: int = 1) -> Reach:
    """Rank the dense argmax among the tokens of the best experts.

    Args:
        head: the sparse head.
        dense: what the dense head chooses.
        k: a number of experts that is to be among those tried.
    """
    places = torch.arange(head.expert_ids.numel(), device=head.expert_ids.device)
    nowhere = torch.full((head.out_features,), len(places), device=places.device)
    place_of = nowhere.scatter_reduce(0, head.expert_ids.flatten(), places, "amin")  # the first of those that repeat
    place_of = place_of.masked_fill(place_of == len(places), -1)
    tried, ranks = sorted({*_growing(1, head.num_experts), k, head.num_experts}), []
    at_once = max(1, ESTIMATES_AT_ONCE // head.out_features)
    with progress("Ranking the tokens", len(dense.states), "positions") as advance:
        for states, best in zip(dense.states.split(at_once), dense.best.split(at_once), strict=True):
            ranks.append(_ranks(head, states, place_of[best], torch.tensor(tried, device=best.device)))
            advance(len(states))
    return Reach(tried, torch.cat(ranks))


def _ranks(head: TopKExpertsHead, states: Tensor, places: Tensor, tried: Tensor) -> Tensor:
    """Ranks of some tokens, given by their places among all experts', at each number of experts: [n, tried]."""
    scores = head.router(states)
    within = head.tail.products(states) + head.tail.bias.float()
    within = head.mask_padding(within, head.expert_ids)
    estimates = within - within.logsumexp(dim=-1, keepdim=True) + scores.unsqueeze(-1)  # (n, M, S)
    own = estimates.flatten(1).gather(1, places.clamp_min(0).unsqueeze(-1)).unsqueeze(-1)
    before = (estimates > own).sum(dim=-1)  # (n, M)
    order = scores.argsort(dim=-1, descending=True)
    ranks = before.gather(1, order).cumsum(dim=-1)[:, tried - 1]
    position = (order == (places // head.expert_size).unsqueeze(-1)).int().argmax(dim=-1, keepdim=True)
    ranks = ranks.masked_fill(position >= tried, torch.iinfo(torch.long).max)
    return ranks.masked_fill((places < 0).unsqueeze(-1), -1)


def numbers_rescored(most: int) -> list[int]:
    """Numbers of exact logits to try, ascending.

    Args:
        most: tokens of all picked experts together.
    """
    return [*_growing(FEWEST_RESCORED, most - 1), most]


def _growing(first: int, last: int) -> Iterator[int]:
    number = first
    while number <= last:
        yield number
        number = max(number + 1, round(number * GROWTH))


def choose(model: TopKExpertsForCausalLM, dense: DenseChoices, reached: Reach, target: Target) -> None:
    """Set k and R to what reads the fewest bytes of all that reach the target with confidence.

    Args:
        model: the converted model; k and R are set, to what comes nearest if nothing reaches the target.
        dense: what the dense head chooses on documents that the router has not seen.
        reached: where its choices stand.
        target: what to reach.
    """
    found = sorted(_candidates(model, dense, reached, target), key=lambda one: one[0])
    for _, setting in found:
        setting.apply(model)
        # What was expected is tried: the tail, too, has a say at rare positions.
        if dense.bound(agrees(model.head, dense)) >= target.agreement:
            return
    _nearest(model, dense, reached, target).apply(model)


def _candidates(
    model: TopKExpertsForCausalLM, dense: DenseChoices, reached: Reach, target: Target
) -> Iterator[tuple[float, Setting]]:
    """For each number of experts the fewest exact logits that reach the target within its bytes, and those bytes."""
    for which, k in enumerate(reached.tried):
        most = k * model.head.expert_size
        rescored = numbers_rescored(most)
        if dense.bound(reached.agrees(which, most)) < target.agreement:
            continue
        low, high = 0, len(rescored) - 1  # by bisection: more exact logits agree at more positions
        while low < high:
            middle = (low + high) // 2
            if dense.bound(reached.agrees(which, rescored[middle])) >= target.agreement:
                high = middle
            else:
                low = middle + 1
        # All of them, for which there is no screen, may be fewer bytes than nearly all.
        for number in dict.fromkeys((rescored[low], most)):
            setting = Setting(k, number)
            if (share := setting.share_of_bytes(model.head)) <= (target.max_bytes_read or math.inf):
                yield share, setting


def _nearest(model: TopKExpertsForCausalLM, dense: DenseChoices, reached: Reach, target: Target) -> Setting:
    """What agrees so often here, if without confidence, for the fewest bytes, or else most often, within the limit."""
    best, nearest = (-1.0, 0.0), Setting(1, FEWEST_RESCORED)
    for which, k in enumerate(reached.tried):
        for rescored in numbers_rescored(k * model.head.expert_size):
            setting = Setting(k, rescored)
            share = setting.share_of_bytes(model.head)
            if share <= (target.max_bytes_read or math.inf):
                key = min(target.agreement, float(reached.agrees(which, rescored).double().mean())), -share
                best, nearest = max((best, nearest), (key, setting), key=lambda one: one[0])
    return nearest


def choose_num_rescored(model: TopKExpertsForCausalLM, dense: DenseChoices) -> None:
    """Set R, at the k that a model has, to the fewest exact logits by which hardly a position is lost.

    Args:
        model: the converted model; R is set.
        dense: what the dense head chooses on documents that the router has not seen.
    """
    k = model.head.num_experts_per_tok
    reached = reach(model.head, dense, k)
    which = reached.tried.index(k)
    most = reached.tried[which] * model.head.expert_size
    wanted = float(reached.agrees(which, most).double().mean()) - LOST_TO_SCREEN
    for rescored in numbers_rescored(most):
        Setting(k, rescored).apply(model)
        if float(reached.agrees(which, rescored).double().mean()) >= wanted:
            return


@torch.inference_mode()
def agrees(head: TopKExpertsHead, dense: DenseChoices) -> Tensor:
    """Whether the sparse head, as it is set, has the dense argmax, bool [N].

    Args:
        head: the sparse head.
        dense: what the dense head chooses.
    """
    chosen = [likeliest(head, head.score(states)) for states in dense.states.split(SCORED_AT_ONCE)]
    return torch.cat(chosen) == dense.best


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
    is_within = fidelity.bytes_read <= (target.max_bytes_read or math.inf)
    return fidelity.agreement_lower_bound >= target.agreement and is_within


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
    within = "" if target.max_bytes_read is None else f" within {target.max_bytes_read:.1%} of the bytes"
    raise TargetNotReachedError(
        f"the target agreement of {target.agreement} is not reached{within}: its lower bound is "
        f"{fidelity.agreement_lower_bound:.4f} (agreement {fidelity.agreement:.4f} on {fidelity.positions:,} held-out "
        f"positions) at num_experts_per_tok {num_experts_per_tok}, which reads {fidelity.bytes_read:.1%}; lower the "
        "target, allow more bytes, give a larger sample, or take this with --allow-below-target"
    )
