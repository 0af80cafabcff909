"""The results of the sparse head's steps: the picked experts, and the exact logits with the terms of the tail."""

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

ROUNDING = 1e-3  # of the mean of estimates, in nats


class Picked(NamedTuple):
    """Which experts the head scores.

    Attributes:
        scores: the router's, fp32 [N, M].
        experts: the picked experts, in no order, [N, k] int64.
        expert_scores: the router's scores of the picked experts, fp32 [N, k].
    """

    scores: Tensor
    experts: Tensor
    expert_scores: Tensor


@dataclass(eq=False)
class Scored:
    """The exact logits of N positions, and the terms of all other logits.

    Attributes:
        exact: logits of the always-on tokens, then of the picked experts' tokens or, with a screen, of the R that it
            kept, [N, A + k S] or [N, A + R].
        ids: their token ids, int64, of the same shape.
        experts: the picked experts, [N, k] int64.
        scores: log mass of each expert for the tail, without the offset, fp32 [N, M].
        masses: log mass of each picked expert, with a screen without the offset, fp32 [N, k].
        known_offset: see `offset`; where it was not computed with the rest, None until it is needed.
        screened: the screen's log p(v | e, h) of the picked experts' tokens, fp32 [N, k, S]; None without a screen.
        places: indices of the R tokens among the k S of the picked experts, [N, R] int64; None without a screen.
        kept: estimates of the R tokens, without the offset, fp32 [N, R]; None without a screen. Where fewer than R are
            left, repeated ids fill the rest, with estimates of -inf, and the offset is known.
    """

    exact: Tensor
    ids: Tensor
    experts: Tensor
    scores: Tensor
    masses: Tensor
    known_offset: Tensor | None = None
    screened: Tensor | None = None
    places: Tensor | None = None
    kept: Tensor | None = None

    @property
    def offset(self) -> Tensor:
        """Aligns the scores with the exact logits, fp32 [N, 1].

        It scales the mass of the estimates of the R tokens to that of their exact logits, so the experts keep their
        masses.
        """
        if self.known_offset is None:
            kept = cast(Tensor, self.kept)
            self.known_offset = mass_over(self.exact[:, -kept.shape[1] :], kept)
        return self.known_offset

    @property
    def tail_scores(self) -> Tensor:
        """Log mass of each expert for the tail, fp32 [N, M]."""
        return self.scores + self.offset

    @property
    def most_left(self) -> Tensor | None:
        """Upper bound of the estimates of tokens without an exact logit, fp32 [N, 1]; None without a screen.

        The screen drops no token that is likelier than one that it keeps. In an expert that was not picked, no token is
        likelier than the whole expert, whose score is at most that of a picked one.
        """
        return None if self.kept is None else torch.maximum(*self._bounds(self.kept)).unsqueeze(1) + self.offset

    def most_left_by_row(self) -> list[float]:
        """[`most_left`] without the offset; with a screen.

        In Python, as operations on a few numbers take longer.
        """
        bounds = self._bounds(cast(Tensor, self.kept))
        return list(map(max, *(bound.tolist() for bound in bounds)))

    def _bounds(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Upper bounds without the offset: of the picked experts' tokens, and of all others, fp32 [N] each."""
        return kept.amin(dim=-1), self.masses.amin(dim=-1)

    def has_the_likeliest(self) -> bool:
        """Whether a quick test shows that at each position the likeliest token is one with an exact logit.

        The mass of R exact logits is at most log R above the largest, and that of R estimates, by Jensen's inequality,
        at least log R above their mean. So where the mean is above all other estimates, the largest exact logit is
        above them with the offset.
        """
        if self.kept is None or self.known_offset is not None:  # logits may have been suppressed since
            return False
        count = self.kept.shape[1]
        means = (total / count for total in self.kept.sum(dim=-1).tolist())  # faster than `mean`
        return all(mean > most + ROUNDING for mean, most in zip(means, self.most_left_by_row(), strict=True))

    def with_exact(self, exact: Tensor) -> "Scored":
        """These values with other exact logits, and the same offset."""
        return replace(self, exact=exact, known_offset=self.offset)

    def part(self, positions: Tensor | slice) -> "Scored":
        """These values at some of the positions."""
        return Scored(*(cast(Tensor, None if one is None else one[positions]) for one in vars(self).values()))


def log_mass(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, [..., n] to [..., 1], if some are finite; faster on a CPU than torch's."""
    return logits.amax(dim=-1, keepdim=True) - logits.log_softmax(dim=-1).amax(dim=-1, keepdim=True)


def mass_over(exact: Tensor, estimates: Tensor) -> Tensor:
    """Log of the mass of exact logits over that of estimates of the same tokens, [N, R] each to [N, 1]."""
    of_exact, of_estimates = log_mass(torch.stack([exact.float(), estimates]))
    return of_exact - of_estimates


def lowest_of_likeliest(logits: Tensor, ids: Tensor) -> Tensor:
    """The token of the largest logit, [N]; of equal logits that of the lowest id, as the argmax over all tokens has it.

    In half precision a position in a hundred has two tokens of the same largest logit. The usual case takes half of the
    operations.

    Args:
        logits: of some tokens, [N, n].
        ids: their token ids, int64 [N, n].
    """
    if len(logits) == 1 and logits.shape[1] > 1 and logits.is_cpu and not torch.compiler.is_compiling():
        (first, second), (place, _) = (two[0].tolist() for two in logits.topk(2))
        if first > second:
            return ids[:, place]
    is_smaller = logits < logits.amax(dim=-1, keepdim=True)
    return ids.masked_fill(is_smaller, torch.iinfo(ids.dtype).max).amin(dim=-1)
