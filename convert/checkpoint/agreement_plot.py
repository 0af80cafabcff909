"""The plot of agreement against bytes read, measured at a few k around the model's own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_topk.inspection.axes import Scale, ticks
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.progress import progress

from ..steps.choose_operating_point import agrees
from ..steps.held_out import DenseArgmax

FACTORS = (1 / 4, 1 / 2, 1, 2, 4)  # of the model's own k
POSITIONS = 2048  # at most, about
WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 640, 360, 70, 50, 60, 30  # in pixels; the last four are margins


@dataclass(frozen=True)
class Point:
    """Agreement and bytes read at one k.

    Attributes:
        num_experts_per_tok: k.
        agreement: top-1, on held-out documents of the calibration text.
        bytes_read: per position, as a share of the dense head's.
        positions: number of positions measured.
    """

    num_experts_per_tok: int
    agreement: float
    bytes_read: float
    positions: int


@torch.inference_mode()
def measure_around(model: TopKExpertsForCausalLM, dense: DenseArgmax) -> list[Point]:
    """Measure agreement and bytes read from a quarter to four times the model's own k, on some of the positions.

    Args:
        model: the converted model; its k is restored at the end.
        dense: the dense argmax on documents that the router was not distilled on.

    Returns:
        A point for each k, in ascending order.
    """
    head, chosen = model.head, model.head.num_experts_per_tok
    dense = dense.evenly_spaced(POSITIONS)
    numbers = sorted({min(max(1, round(factor * chosen)), head.num_experts) for factor in FACTORS})
    points = []
    with progress("Measuring at other k", len(numbers), "values") as advance:
        for k in numbers:
            model.num_experts_per_tok = k
            agreement = float(agrees(head, dense).double().mean())
            points.append(Point(k, agreement, head.bytes_read() / head.dense_bytes(), len(dense.best)))
            advance()
    model.num_experts_per_tok = chosen
    return points


def draw(points: list[Point], chosen: int) -> str:
    """Draw the points as an SVG image.

    Args:
        points: in ascending order of bytes read.
        chosen: the model's own k, which is highlighted.
    """
    x_ticks = ticks([100 * point.bytes_read for point in points])
    y_ticks = ticks([100 * point.agreement for point in points], most=100)
    across = Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    up = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    places = [(across(100 * point.bytes_read), up(100 * point.agreement), point) for point in points]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    return environment.get_template("agreement.svg.jinja").render(
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        top=TOP,
        bottom=HEIGHT - BOTTOM,
        x_ticks=[(across(tick), f"{tick:.6g}") for tick in x_ticks],
        y_ticks=[(up(tick), f"{tick:.6g}") for tick in y_ticks],
        places=places,
        chosen=chosen,
    )
