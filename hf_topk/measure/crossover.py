"""Up to how many positions the sparse head is the faster one on this machine."""

import copy

from torch import Tensor

from ..head import TopKExpertsHead
from .timing import head_seconds

MOST_POSITIONS = 64
ROUNDS = 9
WORTH_IT = 0.95  # of the dense head's time: less of a gain than that is noise


def fastest_up_to(head: TopKExpertsHead, states: Tensor) -> int:
    """Find how many positions a call may have for the sparse head to be the faster one.

    Both are timed side by side on 1, 2, 4, ... positions, until it gains nothing, in the type that the head is stored
    in.

    Args:
        head: the head of a converted model.
        states: hidden states to draw from, [P, d].

    Returns:
        The most positions tried up to which the sparse head was faster by more than noise; 0 if there are none.
    """
    if head.stored_type != head.weight.dtype:  # which it is going to be loaded in
        head = copy.deepcopy(head).to(head.stored_type)
    states = states.to(head.weight)
    positions = 1
    while positions <= MOST_POSITIONS:
        runs = {"dense": head.dense_logits, "sparse": head.sparse_logits}
        seconds = head_seconds(runs, states, positions, ROUNDS, f"Timing the head on {positions} positions")
        if seconds["sparse"].median > WORTH_IT * seconds["dense"].median:
            break
        positions *= 2
    return positions // 2
