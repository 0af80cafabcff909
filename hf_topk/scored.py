"""What the sparse head picks and computes exactly at some positions."""

from typing import NamedTuple, cast

from torch import Tensor


class Picked(NamedTuple):
    """Which experts the head scores.

    Attributes:
        scores: the router's, fp32 [N, M].
        experts: those picked, best first, [N, k] int64.
        expert_scores: the router's scores of those, fp32 [N, k].
    """

    scores: Tensor
    experts: Tensor
    expert_scores: Tensor


class Scored(NamedTuple):
    """What the head computed exactly, and what it takes to tell the rest.

    Attributes:
        always: logits of the always-on tokens, [N, A].
        routed: logits of the picked experts' tokens, [N, k, S], or of the R that a screen left of them, [N, R].
        ids: token ids of those, int64.
        experts: the picked experts, [N, k] int64.
        tail_scores: log mass of each expert as the tail shares it out, fp32 [N, M].
        masses: log mass of each picked expert, fp32 [N, k]; with a screen that of all of them, [N, 1].
        screened: log p(v | e, h) of the picked experts' tokens as the screen has it, fp32 [N, k, S]; None without one.
        places: where the R tokens stand among the k S of the picked experts, [N, R] int64; None without a screen.
        most_left: what no estimate of another token is above, fp32 [N]; None without a screen.
    """

    always: Tensor
    routed: Tensor
    ids: Tensor
    experts: Tensor
    tail_scores: Tensor
    masses: Tensor
    screened: Tensor | None = None
    places: Tensor | None = None
    most_left: Tensor | None = None

    def part(self, positions: Tensor | slice) -> "Scored":
        """The same at some of the positions."""
        return Scored(*(cast(Tensor, None if tensor is None else tensor[positions]) for tensor in self))
