"""What a report shows beside the metrics: use of the experts, calibration of the router, and the worst misses."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ..model.head import LOGITS_AT_ONCE, TopKExpertsHead
from ..windows import NO_TOKEN, Window

OBSERVATIONS_FILE = "report.json"
MISSES_KEPT = 100
TOKENS_BEFORE = 48  # of a miss, to show it in context
CALIBRATED_EVERY = 7  # positions, as the dense head is read once more; no divisor of usual window lengths
CAUSES = {  # of a miss
    "router": "the router did not pick its expert",
    "screen": "the screen ranked it too low for an exact logit",
    "outscored": "another token got a higher logit",
}
DECADES, BINS_PER_DECADE = 6, 2  # of the probabilities in calibration; smaller ones are in the lowest bin


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of a position and an expert whose probability by the router is in one range.

    Probabilities are shares of what all experts have at a position, without the always-on tokens.

    Attributes:
        predicted: mean probability by the router.
        dense: mean probability by the dense head.
        pairs: number of pairs, above 0.
    """

    predicted: float
    dense: float
    pairs: int


@dataclass(frozen=True)
class Miss:
    """A position at which sparse and dense head have different likeliest tokens.

    Attributes:
        before: ids of the tokens before, the last ones.
        follower: id of the token that follows in the text; None at the end of a window.
        dense: the dense head's likeliest token.
        sparse: the sparse head's.
        dense_probability: of `dense`, by the dense head.
        sparse_probability: of `sparse`, by the sparse head.
        dense_probability_of_sparse: of `sparse`, by the dense head.
        cause: why `dense` is not `sparse`, a key of `CAUSES`.
    """

    before: list[int]
    follower: int | None
    dense: int
    sparse: int
    dense_probability: float
    sparse_probability: float
    dense_probability_of_sparse: float
    cause: str

    @property
    def loss(self) -> float:
        """Probability that is lost by taking the sparse head's token, by the dense head."""
        return self.dense_probability - self.dense_probability_of_sparse


@dataclass(frozen=True)
class Observations:
    """What was seen while the heads were compared.

    Attributes:
        text: the name of what they were compared on.
        positions: number of positions.
        picks: number of positions at which each expert was picked, M numbers.
        calibration: of the router, in ascending order of `predicted`.
        missed: number of misses.
        misses: the worst of them, worst first.
    """

    text: str
    positions: int
    picks: list[int]
    calibration: list[CalibrationBin]
    missed: int
    misses: list[Miss]

    @property
    def share_of_busiest(self) -> float:
        """Share of all picks that goes to the tenth of the experts that is picked most often."""
        return sum(sorted(self.picks, reverse=True)[: max(1, len(self.picks) // 10)]) / sum(self.picks)

    def to_json(self) -> str:
        """As the content of `report.json`."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what [`to_json`] made.

        Raises:
            ValueError, TypeError, KeyError: when it is something else.
        """
        found: dict[str, Any] = json.loads(text)
        calibration = [CalibrationBin(**one) for one in found.pop("calibration")]
        misses = [Miss(**one) for one in found.pop("misses")]
        return cls(calibration=calibration, misses=misses, **found)

    def without_text(self) -> Self:
        """The same without misses, which quote the text."""
        return dataclasses.replace(self, misses=[])


class Observer:
    """Collects observations while the heads are compared."""

    def __init__(self, head: TopKExpertsHead) -> None:
        """Start with nothing seen.

        Args:
            head: the sparse head.
        """
        self._head = head
        self._positions = self._missed = 0
        self._misses: list[Miss] = []
        self._picks = torch.zeros(head.num_experts, dtype=torch.long)
        self._bins = torch.zeros(DECADES * BINS_PER_DECADE, 3, dtype=torch.float64)

    def see(self, window: Window, hidden: Tensor, dense: Tensor, sparse: Tensor, agrees: Tensor) -> None:
        """Add the positions of a window.

        Args:
            window: of N positions.
            hidden: their hidden states, [N, d].
            dense: the model's logits with the dense head, [N, V].
            sparse: those with the sparse head, [N, V].
            agrees: whether the likeliest token is the same, [N] bool.
        """
        picked = self._head.pick(hidden, with_level=False).experts
        self._picks += picked.flatten().bincount(minlength=self._head.num_experts).cpu()
        self._calibrate(hidden[-self._positions % CALIBRATED_EVERY :: CALIBRATED_EVERY])
        missed = (~agrees).nonzero().squeeze(1)
        for some in missed.split(max(1, LOGITS_AT_ONCE // self._head.out_features)):
            self._misses += _misses(self._head, window, some, hidden[some], dense[some], sparse[some])
        self._misses = sorted(self._misses, key=lambda miss: -miss.loss)[:MISSES_KEPT]
        self._missed += len(missed)
        self._positions += len(hidden)

    def observations(self, text: str) -> Observations:
        """All that was seen.

        Args:
            text: the name of what the heads were compared on.
        """
        bins = [
            CalibrationBin(predicted / pairs, dense / pairs, int(pairs))
            for predicted, dense, pairs in self._bins.tolist()
            if pairs
        ]
        return Observations(text, self._positions, self._picks.tolist(), bins, self._missed, self._misses)

    def _calibrate(self, hidden: Tensor) -> None:
        """Add to the sums of each bin: probabilities by the router, by the dense head, and pairs."""
        head = self._head
        for some in hidden.split(max(1, LOGITS_AT_ONCE // head.out_features)):
            logits = head.dense_logits(some).float()
            if head.later_bias is not None:
                logits = logits + head.later_bias.float()
            masses = head.mask_padding(logits[:, head.expert_ids], head.expert_ids).logsumexp(dim=-1)
            predicted, dense = (log.softmax(dim=-1).flatten() for log in (head.router(some), masses))
            which = ((predicted.log10() + DECADES) * BINS_PER_DECADE).floor().clamp(0, len(self._bins) - 1).long()
            sums = torch.stack([predicted, dense, torch.ones_like(predicted)], dim=-1)
            self._bins.index_add_(0, which.cpu(), sums.double().cpu())


def _misses(
    head: TopKExpertsHead, window: Window, places: Tensor, hidden: Tensor, dense: Tensor, sparse: Tensor
) -> list[Miss]:
    """Misses of a window at some of its positions: `places` [n], hidden states [n, d], logits of both heads [n, V]."""
    p, q = (logits.float().log_softmax(dim=-1) for logits in (dense, sparse))
    best, chosen = p.argmax(dim=-1, keepdim=True), q.argmax(dim=-1, keepdim=True)
    causes, first = _causes(head, hidden, best), len(window.token_ids) - window.positions
    misses = []
    for row, place in enumerate(places.tolist()):
        end, follower = first + place + 1, window.followers[place]
        misses.append(
            Miss(
                before=list(window.token_ids[max(0, end - TOKENS_BEFORE) : end]),
                follower=None if follower == NO_TOKEN else follower,
                dense=int(best[row]),
                sparse=int(chosen[row]),
                dense_probability=float(p[row, best[row]].exp()),
                sparse_probability=float(q[row, chosen[row]].exp()),
                dense_probability_of_sparse=float(p[row, chosen[row]].exp()),
                cause=causes[row],
            )
        )
    return misses


def _causes(head: TopKExpertsHead, hidden: Tensor, best: Tensor) -> list[str]:
    """Why the dense argmax, [n, 1], is not the sparse one at hidden states [n, d]."""
    scored = head.score(hidden)
    _, place = head.places_of(best)
    is_picked = (scored.experts == place // head.expert_size).any(dim=-1)
    is_exact = (scored.ids == best).any(dim=-1)
    return [
        "outscored" if exact else "screen" if picked else "router"
        for exact, picked in zip(is_exact.tolist(), is_picked.tolist(), strict=True)
    ]
