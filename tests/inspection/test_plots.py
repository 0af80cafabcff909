"""Where the marks of the report's plots go."""

import math
from itertools import pairwise

import pytest
import torch
from support.tiny_models import tiny_converted

from hf_topk.evaluation.observations import CalibrationBin
from hf_topk.inspection.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAP_SIZE,
    RIGHT,
    TOP,
    WIDTH,
    Plot,
    agreement_plot,
    calibration_plot,
    load_plot,
    map_of_experts,
)


def check_within(plot: Plot) -> None:
    for x, y in [(mark.x, mark.y) for mark in plot.marks] + [plot.reference[:2], plot.reference[2:]] * bool(
        plot.reference
    ):
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT - BOTTOM
    for labels in (plot.x_ticks, plot.y_ticks):
        assert 2 <= len(labels) <= 12
        assert len({label for _, label in labels}) == len(labels)


def test_the_own_k_is_marked_on_the_curve() -> None:
    curve = [
        {"num_experts_per_tok": k, "agreement": agreement, "bytes_read": share}
        for k, agreement, share in ((16, 0.98, 0.04), (64, 0.998, 0.05), (2560, 1.0, 0.2))
    ]
    plot = agreement_plot(curve, 64)
    check_within(plot)
    assert [mark.label for mark in plot.marks] == ["k = 16", "k = 64: this model", "k = 2,560"]
    assert [mark.is_chosen for mark in plot.marks] == [False, True, False]
    assert [mark.has_room for mark in plot.marks] == [True, True, False]
    for left, right in pairwise(plot.marks):
        assert left.x < right.x
        assert left.y > right.y  # pixels go down


@pytest.mark.parametrize("lowest", [1e-9, 3e-4, 0.2])
def test_a_calibrated_router_is_on_the_line(lowest: float) -> None:
    bins = [CalibrationBin(p, p, 10) for p in (lowest, 0.3, 0.9)] + [CalibrationBin(0.95, 0.0, 1)]
    plot = calibration_plot(bins)
    check_within(plot)
    assert len(plot.marks) == 3  # 0 has no place on a logarithmic axis
    x0, y0, x1, y1 = plot.reference
    for mark in plot.marks:
        assert mark.y == pytest.approx(y0 + (mark.x - x0) / (x1 - x0) * (y1 - y0), abs=0.2)


@pytest.mark.parametrize("picks", [[5, 0, 3, 100], [1], [0, 7], list(range(16_000))])
def test_the_load_falls_from_the_most_used_expert(picks: list[int]) -> None:
    positions = max(picks)
    plot = load_plot(picks, positions, 0.25)
    check_within(plot)
    assert (plot.marks[0].x, plot.marks[0].y) == (LEFT, TOP)  # the first is picked everywhere
    assert len(plot.marks) <= 201
    used = sum(pick > 0 for pick in picks)
    last = LEFT + math.log10(used) / (len(plot.x_ticks) - 1) * (WIDTH - RIGHT - LEFT)
    assert plot.marks[-1].x == pytest.approx(last, abs=0.1)
    for above, below in pairwise(plot.marks):
        assert above.y <= below.y


def test_near_experts_are_near_on_the_map() -> None:
    head = tiny_converted().head
    centres = torch.tensor([[0.0, 0.0], [10.0, 1.0], [3.0, 9.0]])
    with torch.no_grad():  # three pairs of like experts
        head.weight.zero_()
        for expert, ids in enumerate(head.expert_ids):
            head.weight[ids, :2] = centres[expert // 2] + 0.01 * expert
    places, variance = map_of_experts(head)
    assert variance == pytest.approx(1)
    for axis in range(2):
        along = [place[axis] for place in places]
        assert sorted(along) == list(range(0, MAP_SIZE + 1, MAP_SIZE // 5))
        for number in range(0, 6, 2):
            assert abs(along[number] - along[number + 1]) == MAP_SIZE // 5


@pytest.mark.parametrize("sizes", [{"num_experts": 1, "num_experts_per_tok": 1}, {"num_experts": 2}])
def test_a_map_of_few_experts(sizes: dict[str, int]) -> None:
    head = tiny_converted(**sizes, expert_size=96).head
    places, variance = map_of_experts(head)
    assert len(places) == head.num_experts
    assert variance == pytest.approx(1)
