"""The frontier of agreement against bytes read: a converted model beside the methods of others, on the same text.

    python -m hf_topk.convert.frontier CONVERTED --text TEXT

A position agrees if the dense argmax is among the tokens that get an exact logit, which then wins. A tail that puts
another token first by chance is left out of it.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Annotated

import torch
import typer
from torch.nn import functional as F

from hf_topk.cli import main
from hf_topk.documents import read_documents
from hf_topk.head import TopKExpertsHead
from hf_topk.loading import load_converted
from hf_topk.measure.baselines import HNSW_CANDIDATES, HnswHead, MissingPackageError
from hf_topk.measure.fidelity import WINDOW_LENGTH, readable_length
from hf_topk.measure.flashhead import CLUSTER_SIZE, FlashHead
from hf_topk.progress import progress
from hf_topk.text import make_windows

from .calibrate import DenseChoices, Setting, dense_choices, numbers_rescored, reach
from .partition import partition

LEVELS = (0.99, 0.995, 0.998, 0.999)
POSITIONS = 6000
STATES_AT_ONCE = 256
OURS, FLASHHEAD, INT8, HNSW = "hf-topk", "FlashHead", "int8", "HNSW"


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of a method, and what it reaches.

    Attributes:
        method: whose.
        setting: what was set.
        agreement: share of the positions that agree.
        bytes_read: for a position, as a share of the dense head's in the type that it is stored in; None where it
            depends on the walk through an index.
    """

    method: str
    setting: str
    agreement: float
    bytes_read: float | None


@torch.inference_mode()
def measure_frontier(head: TopKExpertsHead, dense: DenseChoices, seed: int = 0) -> Iterator[Point]:
    """Find what reads the fewest bytes at each level of agreement, method by method.

    Args:
        head: of a converted model; its k and R are others afterwards.
        dense: what the dense head chooses on text that nothing was learned from.
        seed: of FlashHead's clustering.

    Yields:
        Points of ours and of FlashHead's at each of `LEVELS` that they reach, of int8 rows, and of HNSW if hnswlib is
        installed.
    """
    yield from _envelope(_points_of_ours(head, dense))
    yield from _envelope(_points_of_flashhead(head, dense, seed))
    yield _point_of_int8(head, dense)
    try:
        yield _point_of_hnsw(HnswHead(head.weight, head.bias), dense)
    except MissingPackageError as error:
        print(f"{HNSW} is left out: {error}", file=sys.stderr)


def _envelope(points: Iterator[Point]) -> Iterator[Point]:
    """The point of fewest bytes at each level."""
    measured = list(points)
    for level in LEVELS:
        reaching = [point for point in measured if point.agreement >= level]
        if reaching:
            yield min(reaching, key=lambda point: point.bytes_read or 0.0)


def _points_of_ours(head: TopKExpertsHead, dense: DenseChoices) -> Iterator[Point]:
    reached = reach(head, dense)
    for which, k in enumerate(reached.tried):
        for rescored in numbers_rescored(k * head.expert_size):
            agreement = float(reached.agrees(which, rescored).double().mean())
            yield Point(OURS, f"k = {k}, R = {rescored}", agreement, Setting(k, rescored).share_of_bytes(head))


def _points_of_flashhead(head: TopKExpertsHead, dense: DenseChoices, seed: int) -> Iterator[Point]:
    clusters = partition(F.normalize(head.weight.float(), dim=-1), min(CLUSTER_SIZE, head.out_features), seed)
    flash = FlashHead(head.weight, head.bias, clusters.to(head.weight.device))
    cluster_of = torch.empty(head.out_features, dtype=torch.long, device=head.weight.device)
    cluster_of[flash.cluster_ids.flatten()] = (
        torch.arange(clusters.numel(), device=cluster_of.device) // clusters.shape[1]
    )
    needed = []
    for states, best in zip(dense.states.split(STATES_AT_ONCE), dense.best.split(STATES_AT_ONCE), strict=True):
        scores = flash.scores(states)
        needed.append((scores > scores.gather(1, cluster_of[best].unsqueeze(-1))).sum(dim=-1) + 1)
    ranks = torch.cat(needed).sort().values
    row = head.dense_bytes() / head.out_features
    for level in LEVELS:
        flash.num_probes = int(ranks[min(len(ranks) - 1, int(level * len(ranks)))])
        agreement = float((ranks <= flash.num_probes).double().mean())
        read = flash.centroids.numel() * head.stored_type.itemsize + flash.num_probes * clusters.shape[1] * row
        yield Point(FLASHHEAD, f"{flash.num_probes} of {len(clusters)} clusters", agreement, read / head.dense_bytes())


def _point_of_int8(head: TopKExpertsHead, dense: DenseChoices) -> Point:
    """Rows rounded to int8 with a scale each; the hidden state is not."""
    rows = head.weight.float()
    scales = rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    rounded = (rows / scales).round() * scales
    bias = None if head.bias is None else head.bias.float()
    agreed = 0
    for states, best in zip(dense.states.split(STATES_AT_ONCE), dense.best.split(STATES_AT_ONCE), strict=True):
        agreed += int((F.linear(states.float(), rounded, bias).argmax(dim=-1) == best).sum())
    read = head.weight.numel() + (1 + (bias is not None)) * len(rows) * head.stored_type.itemsize
    return Point(INT8, "a scale a row", agreed / len(dense.best), read / head.dense_bytes())


def _point_of_hnsw(index: HnswHead, dense: DenseChoices) -> Point:
    hits = 0
    with progress("Searching the HNSW index", len(dense.states), "positions") as advance:
        for states, best in zip(dense.states.split(STATES_AT_ONCE), dense.best.split(STATES_AT_ONCE), strict=True):
            hits += int((index(states.float()).argmax(dim=-1) == best).sum())
            advance(len(states))
    return Point(HNSW, f"{HNSW_CANDIDATES} candidates", hits / len(dense.best), None)


def as_markdown(points: list[Point]) -> str:
    """Points as a table in Markdown.

    Args:
        points: in the order in which they were measured.
    """
    lines = ["| method | setting | agreement | bytes read |", "|---|---|---|---|"]
    for point in points:
        read = "unknown" if point.bytes_read is None else f"{point.bytes_read:.2%}"
        lines.append(f"| {point.method} | {point.setting} | {point.agreement:.2%} | {read} |")
    return "\n".join(lines)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def frontier(
    model: Annotated[str, typer.Argument(metavar="CONVERTED", help="A converted model.")],
    text: Annotated[str, typer.Option(help="Text to measure on: a file, a folder, or a data set.")],
    positions: Annotated[int, typer.Option(help="Tokens to measure on.")] = POSITIONS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the points as JSON.")] = False,
) -> None:
    """Print the fewest bytes that reach each agreement: a converted model beside FlashHead's method, int8 and HNSW."""
    converted, tokenizer = load_converted(model, dtype="float32")
    length = readable_length(converted.config, WINDOW_LENGTH)
    windows = make_windows(read_documents(text), tokenizer, length, positions, seed=0)
    points = list(measure_frontier(converted.head, dense_choices(converted, windows)))
    print(json.dumps([dataclasses.asdict(point) for point in points], indent=2) if as_json else as_markdown(points))


if __name__ == "__main__":
    main(app)
