"""What the sparse head picks and computes exactly at some positions."""

from typing import NamedTuple, cast

import torch
from torch import Tensor


class Picked(NamedTuple):
    """Which experts the head scores.

    Attributes:
        scores: the router's, fp32 [N, M].
        experts: those picked, in no order, [N, k] int64.
        expert_scores: the router's scores of those, fp32 [N, k].
    """

    scores: Tensor
    experts: Tensor
    expert_scores: Tensor


class Scored(NamedTuple):
    """What the head computed exactly, and what it takes to tell the rest.

    Attributes:
        exact: logits of the always-on tokens, and of the picked experts' tokens or of the R that a screen left of them,
            [N, A + k S] or [N, A + R].
        ids: token ids of the latter, int64 [N, k S] or [N, R].
        experts: the picked experts, [N, k] int64.
        scores: log mass of each expert as the tail shares it out, up to the offset, fp32 [N, M].
        offset: what aligns the scores with the exact logits, fp32 [N, 1].
        masses: log mass of each picked expert, up to the offset with a screen, fp32 [N, k].
        screened: log p(v | e, h) of the picked experts' tokens as the screen has it, fp32 [N, k, S]; None without one.
        places: where the R tokens stand among the k S of the picked experts, [N, R] int64; None without a screen.
        least: of the estimates of those, up to the offset, fp32 [N, 1]; None without a screen.
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
    def always(self) -> Tensor:
        """Logits of the always-on tokens, [N, A]."""
        return self.exact[:, : self.exact.shape[1] - self.ids.shape[1]]

    @property
    def routed(self) -> Tensor:
        """Logits of the other tokens that have exact ones, [N, k S] or [N, R]."""
        return self.exact[:, self.exact.shape[1] - self.ids.shape[1] :]

    @property
    def tail_scores(self) -> Tensor:
        """Log mass of each expert as the tail shares it out, fp32 [N, M]."""
        return self.scores + self.offset

    @property
    def most_left(self) -> Tensor | None:
        """What no estimate of a token without an exact logit is above, fp32 [N, 1]; None without a screen.

        A token that the screen left out is no likelier than one that it kept, and no token is likelier than all of its
        expert, whose score is no more than a picked one's.
        """
        if self.least is None:
            return None
        return torch.maximum(self.least, self.masses.amin(dim=-1, keepdim=True)) + self.offset

    def part(self, positions: Tensor | slice) -> "Scored":
        """The same at some of the positions."""
        return Scored(*(cast(Tensor, None if tensor is None else tensor[positions]) for tensor in self))
