"""The plots of a report: where each mark goes, in the pixels of an image that scales with the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation.observations import CalibrationBin
from ..model.head import TopKExpertsHead
from ..progress import progress_once_slow
from .axes import Scale, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 330, 74, 26, 16, 50  # in pixels; the last four are margins
POINTS_OF_LOAD = 200  # drawn of the curve of all experts
ROOM_FOR_LABEL = 130  # pixels; a label that has less of it on its right goes to the left of its point
FULLY_WRITTEN = -3  # smaller powers of ten have an exponent
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MAP_SIZE = 1000  # units of the map in each direction
ROWS_AT_ONCE = 2**14  # of the head


@dataclass(frozen=True)
class Mark:
    """A point of a plot.

    Attributes:
        x: pixel.
        y: pixel.
        label: beside it, or as its description.
        is_chosen: whether it is the model's own setting.
    """

    x: float
    y: float
    label: str
    is_chosen: bool = False

    @property
    def has_room(self) -> bool:
        """Whether a label fits on its right."""
        return self.x + ROOM_FOR_LABEL < WIDTH


@dataclass(frozen=True)
class Plot:
    """Axes and marks.

    Attributes:
        x_label: of the horizontal axis, with its unit.
        y_label: of the vertical axis, with its unit.
        x_ticks: pixel and label of each vertical grid line.
        y_ticks: pixel and label of each horizontal grid line.
        marks: in the order of a line through them.
        reference: ends of a line to compare with, x and y in turn; empty if there is none.
    """

    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[Mark]
    reference: tuple[float, ...] = ()


def agreement_plot(curve: Sequence[dict[str, Any]], chosen: int) -> Plot:
    """Agreement against bytes read, at several k.

    Args:
        curve: as in the metrics of a conversion, at least one point.
        chosen: the model's own k.
    """
    x_ticks = ticks([100 * point["bytes_read"] for point in curve])
    y_ticks = ticks([100 * point["agreement"] for point in curve], most=100)
    across = Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    up = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    marks = []
    for point in curve:
        k = point["num_experts_per_tok"]
        label = f"k = {k:,}: this model" if k == chosen else f"k = {k:,}"
        marks.append(Mark(across(100 * point["bytes_read"]), up(100 * point["agreement"]), label, k == chosen))
    return Plot(
        "bytes read for a position, % of the dense head's",
        "top-1 agreement with the dense head, %",
        [(across(tick), f"{tick:.6g}") for tick in x_ticks],
        [(up(tick), f"{tick:.6g}") for tick in y_ticks],
        marks,
    )


def calibration_plot(bins: Sequence[CalibrationBin]) -> Plot:
    """Probability of experts by the dense head against that by the router, both in powers of ten.

    Args:
        bins: at least one.
    """
    shown = [one for one in bins if one.predicted > 0 and one.dense > 0]
    low = math.floor(min(math.log10(min(one.predicted, one.dense)) for one in shown))
    across, up = Scale(low, 0, LEFT, WIDTH - RIGHT), Scale(low, 0, HEIGHT - BOTTOM, TOP)
    marks = [
        Mark(
            across(math.log10(one.predicted)),
            up(math.log10(one.dense)),
            f"router {one.predicted:.2%}, dense head {one.dense:.2%}, {one.pairs:,} pairs of position and expert",
        )
        for one in shown
    ]
    return Plot(
        "probability of an expert by the router",
        "probability by the dense head, mean",
        [(across(power), _power(power)) for power in range(low, 1)],
        [(up(power), _power(power)) for power in range(low, 1)],
        marks,
        (across(low), up(low), across(0), up(0)),
    )


def load_plot(picks: Sequence[int], positions: int, even: float) -> Plot:
    """How often each expert is picked, in order of use, both axes in powers of ten.

    Args:
        picks: number of positions at which each expert was picked.
        positions: number of positions, above 0.
        even: the share of positions if all experts were picked equally often.
    """
    shares = [count / positions for count in sorted(picks, reverse=True) if count]
    low = min(-1, math.floor(math.log10(shares[-1])), math.floor(math.log10(even)))
    most = max(1, math.ceil(math.log10(len(picks))))
    across, up = Scale(0, most, LEFT, WIDTH - RIGHT), Scale(low, 0, HEIGHT - BOTTOM, TOP)
    ranks = sorted({round(len(shares) ** (step / POINTS_OF_LOAD)) for step in range(POINTS_OF_LOAD + 1)})
    marks = [
        Mark(across(math.log10(rank)), up(math.log10(shares[rank - 1])), f"{shares[rank - 1]:.2%}") for rank in ranks
    ]
    level = up(math.log10(even))
    return Plot(
        "rank of the expert, the most used first",
        "positions that pick the expert",
        [(across(power), f"{10**power:,}") for power in range(most + 1)],
        [(up(power), _percent(power)) for power in range(low, 1)],
        marks,
        (LEFT, level, WIDTH - RIGHT, level),
    )


def map_of_experts(head: TopKExpertsHead) -> tuple[list[tuple[int, int]], float]:
    """Project the experts' centroids, the means of their tokens' rows of the head, to two dimensions.

    A coordinate is the rank along a principal component: frequent tokens' rows are so unlike the others' that distances
    would leave most of the map empty.

    Args:
        head: of a converted model.

    Returns:
        Coordinates of each expert from 0 to 1000, and the share of the variance that the two components have.
    """
    centroids = []
    with progress_once_slow("Reading the experts' rows", head.num_experts, "experts") as advance:
        for ids in head.expert_ids.split(max(1, ROWS_AT_ONCE // head.expert_size)):
            centroids.append(head.weight.detach()[ids].float().mean(dim=1).cpu())
            advance(len(ids))
    rows = torch.cat(centroids)
    rows -= rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(rows.t() @ rows)  # in ascending order
    ranks = (rows @ directions[:, -2:].flip(1)).argsort(dim=0).argsort(dim=0)
    places = (ranks * (MAP_SIZE / max(1, head.num_experts - 1))).round().int().tolist()
    total = float(variances.sum())
    return [(x, y) for x, y in places], float(variances[-2:].sum()) / total if total > 0 else 1.0


def _percent(power: int) -> str:
    """A power of ten in percent."""
    return f"{100 * 10.0**power:.10g} %"


def _power(power: int) -> str:
    """A power of ten."""
    return f"{10.0**power:g}" if power >= FULLY_WRITTEN else "10" + str(power).translate(SUPERSCRIPTS)
