"""Held-out documents: split from the others, and what the dense head says at each of their positions."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_topk.evaluation.confidence_bound import lower_bound
from hf_topk.model.errors import InputError
from hf_topk.model.head import LOGITS_AT_ONCE
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.progress import progress
from hf_topk.windows import KIND, Window, batches_of

from .hidden_states import states_of_batch

STATES_AT_ONCE = 256
FEWEST_DOCUMENTS = 4  # of a kind to hold out, as one or two documents say little about it; but no more than a third
FEWEST_OF_KIND = 200  # positions: one that disagrees leaves 99.5 %
POOLED_POSITIONS = 400  # with which the agreement on all text counts in the estimate for one kind


def split_by_document(windows: list[Window], held_out: float, seed: int) -> tuple[list[Window], list[Window]]:
    """Split the windows by document: some to distil on, the rest held out to measure on.

    A single document is cut in two.

    Args:
        windows: at least two.
        held_out: share of the documents of each kind of text to hold out; at least 4 of each are, or a third, but not
            the only one: what nothing is learned from is no measure.
        seed: of the random split.

    Returns:
        The windows to distil on and the held-out windows; neither is empty.

    Raises:
        InputError: when there is only one window.
    """
    if len(windows) < 2:
        raise InputError("the calibration text fills only one window, which cannot be split: give more text")
    documents = sorted({window.document for window in windows})
    if len(documents) == 1:
        first = min(len(windows) - 1, max(1, round(len(windows) * (1 - held_out))))
        return windows[:first], windows[first:]
    chosen: set[int] = set()
    for kind in sorted({window.kind for window in windows}):
        chosen |= _some_of({window.document for window in windows if window.kind == kind}, held_out, seed)
    chosen = chosen or _some_of(set(documents), held_out, seed)  # each of a kind of its own
    return (
        [window for window in windows if window.document not in chosen],
        [window for window in windows if window.document in chosen],
    )


def _some_of(documents: set[int], share: float, seed: int) -> set[int]:
    """A random share of the documents: at least four or a third of them, at least one, but not all."""
    fewest = max(1, min(FEWEST_DOCUMENTS, len(documents) // 3))
    count = min(len(documents) - 1, max(fewest, round(len(documents) * share)))
    return set(random.Random(seed).sample(sorted(documents), count))


@dataclass(frozen=True)
class DenseArgmax:
    """The dense head's argmax at each held-out position, computed once for all operating points.

    Attributes:
        states: hidden states, [N, d].
        best: argmax of the dense logits, int64 [N].
        documents: index of each position's document, from 0, int64 [N].
        kinds: index of each position's broad kind of text in `kind_names`, int64 [N].
        kind_names: the broad kinds of text.
    """

    states: Tensor
    best: Tensor
    documents: Tensor
    kinds: Tensor
    kind_names: tuple[str, ...] = (KIND,)

    def evenly_spaced(self, count: int) -> "DenseArgmax":
        """A subset of at most `count` positions."""
        is_kept = torch.zeros_like(self.best, dtype=torch.bool)
        is_kept[:: -(-len(self.best) // count)] = True
        return self.part(is_kept)

    def part(self, is_kept: Tensor) -> "DenseArgmax":
        """The positions where `is_kept`, bool [N], is true."""
        documents = self.documents[is_kept].unique(return_inverse=True)[1]
        return DenseArgmax(self.states[is_kept], self.best[is_kept], documents, self.kinds[is_kept], self.kind_names)

    def agreement(self, agrees: Tensor) -> float:
        """The agreement, or its estimate for the kind of text where it is lowest; `agrees` is bool [N].

        Few positions say little about a kind. So each estimate is drawn towards the agreement on all text, as in
        empirical Bayes estimation (Efron and Morris 1975).
        """
        pooled, more = float(agrees.double().mean()), POOLED_POSITIONS
        return min([pooled, *((count + more * pooled) / (of + more) for count, of in self._counts(agrees))])

    def by_kind(self, agrees: Tensor) -> dict[str, float]:
        """The agreement on each kind of text of which there are enough positions; `agrees` is bool [N]."""
        counts = zip(self.kind_names, self._counts(agrees), strict=True)
        return {kind: count / of for kind, (count, of) in counts if of >= FEWEST_OF_KIND}

    def _counts(self, agrees: Tensor) -> list[tuple[int, int]]:
        """Of each kind of text the positions that agree, and all of them."""
        agreed, positions = (
            kinds.bincount(minlength=len(self.kind_names)) for kinds in (self.kinds[agrees], self.kinds)
        )
        return list(zip(agreed.tolist(), positions.tolist(), strict=True))

    def bound(self, agrees: Tensor) -> float:
        """The lower bound of the agreement on as many new documents; `agrees` is bool [N]."""
        positions = self.documents.bincount()
        agreed = self.documents[agrees].bincount(minlength=len(positions))
        return lower_bound(agreed.tolist(), positions.tolist(), of_new_documents=True)

    def reached(self, agrees: Tensor) -> float:
        """The target that is reached: the lower bound, or the estimate for the worst kind of text if it is lower."""
        return min(self.bound(agrees), self.agreement(agrees))


@torch.inference_mode()
def dense_argmax(model: TopKExpertsForCausalLM, windows: list[Window]) -> DenseArgmax:
    """Run the dense model on the windows and take its argmax at each position.

    Args:
        model: the converted model.
        windows: token ids; each token is one position.
    """
    head, kept, best = model.head, [], []
    documents, _ = _numbered(windows, "document")
    kinds, kind_names = _numbered(windows, "broad_kind")
    with progress("Running the dense model", len(documents), "positions") as advance:
        for batch in batches_of(windows):
            states = states_of_batch(model.base, batch).to(head.weight.device)
            best += [argmax(F.linear(some, head.weight, head.full_bias)) for some in states.split(STATES_AT_ONCE)]
            kept.append(states)
            advance(len(states))
    device = best[0].device
    return DenseArgmax(torch.cat(kept), torch.cat(best), documents.to(device), kinds.to(device), kind_names)


def _numbered(windows: list[Window], name: str) -> tuple[Tensor, tuple[Any, ...]]:
    """The index of each position's value of an attribute of its window, int64 [N], and the values."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(getattr(one, name) for one in windows))}
    indices = [numbers[getattr(window, name)] for window in windows for _ in range(window.positions)]
    return torch.tensor(indices), tuple(numbers)


def argmax(logits: Tensor) -> Tensor:
    """Argmax of each row, [N, V] to int64 [N]. Blocks in fp32 are three times as fast as bfloat16."""
    blocks = logits.split(max(1, LOGITS_AT_ONCE // logits.shape[-1]))
    return torch.cat([block.float().argmax(dim=-1) for block in blocks])
