"""The results of the sparse head's steps: the picked experts, and the exact logits with the terms of the tail."""

from typing import NamedTuple, cast

import torch
from torch import Tensor


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


class Scored(NamedTuple):
    """The exact logits of N positions, and the terms of all other logits.

    Attributes:
        exact: logits of the always-on tokens, then of the picked experts' tokens or, with a screen, of the R that it
            kept, [N, A + k S] or [N, A + R].
        ids: their token ids, int64, of the same shape.
        experts: the picked experts, [N, k] int64.
        scores: log mass of each expert for the tail, without the offset, fp32 [N, M].
        offset: aligns the scores with the exact logits, fp32 [N, 1].
        masses: log mass of each picked expert, with a screen without the offset, fp32 [N, k].
        screened: the screen's log p(v | e, h) of the picked experts' tokens, fp32 [N, k, S]; None without a screen.
        places: indices of the R tokens among the k S of the picked experts, [N, R] int64; None without a screen.
        least: the least estimate among the R tokens, without the offset, fp32 [N, 1]; None without a screen.
    """

    exact: Tensor
    ids: Tensor
    experts: Tensor
    scores: Tensor
    offset: Tensor
    masses: Tensor
    screened: Tensor | None = None
    places: Tensor | None = None
    least: Tensor | None = None

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
        if self.least is None:
            return None
        return torch.maximum(self.least, self.masses.amin(dim=-1, keepdim=True)) + self.offset

    def part(self, positions: Tensor | slice) -> "Scored":
        """These values at some of the positions."""
        return Scored(*(cast(Tensor, None if tensor is None else tensor[positions]) for tensor in self))


def log_mass(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, [..., n] to [..., 1], if some are finite; faster on a CPU than torch's."""
    return logits.amax(dim=-1, keepdim=True) - logits.log_softmax(dim=-1).amax(dim=-1, keepdim=True)


def lowest_of_likeliest(logits: Tensor, ids: Tensor) -> Tensor:
    """The token of the largest logit, [N]; of equal logits that of the lowest id, as the argmax over all tokens has it.

    In half precision a position in a hundred has two tokens of the same largest logit.

    Args:
        logits: of some tokens, [N, n].
        ids: their token ids, int64 [N, n].
    """
    is_smaller = logits < logits.amax(dim=-1, keepdim=True)
    return ids.masked_fill(is_smaller, torch.iinfo(ids.dtype).max).amin(dim=-1)
