"""The frontier of agreement against bytes read: a converted model and other methods on the same text.

    make study NAME=frontier ARGS="CONVERTED --text TEXT"

A position agrees if the dense argmax gets an exact logit. Positions where the tail still outscores it are not
subtracted.
"""

import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from hf_topk.bench.baselines import HNSW_CANDIDATES, HnswHead, MissingPackageError, int8_head
from hf_topk.bench.flashhead import CLUSTER_SIZE, FlashHead
from hf_topk.bench.timing import head_seconds
from hf_topk.cli import main
from hf_topk.convert.steps.choose_operating_point import OperatingPoint, numbers_rescored, rank_argmax
from hf_topk.convert.steps.held_out import DenseArgmax
from hf_topk.convert.steps.partition import partition
from hf_topk.model.head import TopKExpertsHead
from hf_topk.model.token_chooser import likeliest
from hf_topk.progress import progress
from studies.measured_text import load_and_run

LEVELS = (0.99, 0.995, 0.998, 0.999)
POSITIONS = 6000
STATES_AT_ONCE = 256
ROUNDS = 100  # of the timing
DENSE, OURS, FLASHHEAD, INT8, HNSW = "dense", "hf-topk", "FlashHead", "int8", "HNSW"

Run = Callable[[Tensor], Any]
Build = Callable[[TopKExpertsHead], Run | None]  # a method over the head that is timed; None if its package is missing


@dataclasses.dataclass(frozen=True)
class Point:
    """A method at one setting.

    Attributes:
        method: its name.
        setting: its parameters.
        agreement: share of the positions that agree.
        bytes_read: per position, as a share of the dense head's in its stored dtype; None if it depends on the search
            in an index.
        milliseconds: for the next token at batch 1, in the stored dtype.
    """

    method: str
    setting: str
    agreement: float
    bytes_read: float | None
    milliseconds: float | None = None


@torch.inference_mode()
def measure_frontier(head: TopKExpertsHead, dense: DenseArgmax, seed: int = 0) -> list[Point]:
    """Find each method's setting of fewest bytes at each level of agreement, and time it.

    Args:
        head: of a converted model.
        dense: the dense argmax on text that the conversion has not seen.
        seed: of FlashHead's clustering.

    Returns:
        Points of the dense head; of hf-topk and FlashHead, at each of `LEVELS` that they reach; of int8, timed if
        torchao is installed; and of HNSW, if hnswlib is installed.
    """
    measured: list[tuple[Point, Build]] = [(Point(DENSE, "", 1.0, 1.0), lambda timed: timed.dense_logits)]
    measured += _envelope(_points_of_ours(head, dense))
    measured += _envelope(_points_of_flashhead(head, dense, seed))
    measured.append(
        (_point_of_int8(head, dense), lambda timed: _or_none(INT8, lambda: int8_head(timed.weight, timed.bias)))
    )
    if (index := _or_none(HNSW, lambda: HnswHead(head.weight, head.bias))) is not None:
        measured.append((_point_of_hnsw(index, dense), lambda _: index))
    timed = copy.deepcopy(head).to(head.stored_type)
    built = {str(number): build(timed) for number, (_, build) in enumerate(measured)}
    runs = {number: run for number, run in built.items() if run is not None}
    seconds = head_seconds(runs, dense.states.to(timed.weight.dtype), 1, ROUNDS, "Timing the heads")
    times = {number: 1000 * spread.median for number, spread in seconds.items()}
    return [dataclasses.replace(one[0], milliseconds=times.get(str(number))) for number, one in enumerate(measured)]


def _or_none(name: str, build: Callable[[], Run]) -> Run | None:
    """Build a head; None if its package is missing."""
    try:
        return build()
    except MissingPackageError as error:
        print(f"{name} is skipped: {error}", file=sys.stderr)
        return None


def _envelope(points: Iterator[tuple[Point, Build]]) -> Iterator[tuple[Point, Build]]:
    """Yield the point of fewest bytes at each level."""
    measured = list(points)
    for level in LEVELS:
        reaching = [one for one in measured if one[0].agreement >= level]
        if reaching:
            yield min(reaching, key=lambda one: one[0].bytes_read or 0.0)


def _points_of_ours(head: TopKExpertsHead, dense: DenseArgmax) -> Iterator[tuple[Point, Build]]:
    ranks = rank_argmax(head, dense)
    for which, k in enumerate(ranks.tried):
        for rescored in numbers_rescored(k * head.expert_size):
            agreement = float(ranks.agrees(which, rescored).double().mean())
            point = Point(OURS, f"k = {k}, R = {rescored}", agreement, OperatingPoint(k, rescored).share_of_bytes(head))
            yield point, functools.partial(_set_to, k=k, rescored=rescored)


def _set_to(head: TopKExpertsHead, k: int, rescored: int) -> Run:
    """A function from hidden states to the next tokens, at another k and R."""
    twin = copy.copy(head)
    twin.config = copy.copy(head.config)
    twin.num_experts_per_tok, twin.num_rescored = k, rescored
    return lambda hidden: likeliest(twin, twin.score(hidden))


def _points_of_flashhead(head: TopKExpertsHead, dense: DenseArgmax, seed: int) -> Iterator[tuple[Point, Build]]:
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

    def build(timed: TopKExpertsHead, num_probes: int) -> Run:
        twin = copy.copy(flash)
        twin.weight, twin.bias, twin.centroids = timed.weight, timed.bias, flash.centroids.to(timed.weight)
        twin.num_probes = num_probes
        return twin.next_tokens

    for level in LEVELS:
        probes = int(ranks[min(len(ranks) - 1, int(level * len(ranks)))])
        agreement = float((ranks <= probes).double().mean())
        read = flash.centroids.numel() * head.stored_type.itemsize + probes * clusters.shape[1] * row
        point = Point(FLASHHEAD, f"{probes} of {len(clusters)} clusters", agreement, read / head.dense_bytes())
        yield point, functools.partial(build, num_probes=probes)


def _point_of_int8(head: TopKExpertsHead, dense: DenseArgmax) -> Point:
    """Rows rounded to int8 with one scale each; hidden states are not rounded."""
    rows = head.weight.float()
    scales = rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    rounded = (rows / scales).round() * scales
    bias = None if head.bias is None else head.bias.float()
    agreed = 0
    for states, best in zip(dense.states.split(STATES_AT_ONCE), dense.best.split(STATES_AT_ONCE), strict=True):
        agreed += int((F.linear(states.float(), rounded, bias).argmax(dim=-1) == best).sum())
    read = head.weight.numel() + (1 + (bias is not None)) * len(rows) * head.stored_type.itemsize
    return Point(INT8, "one scale per row", agreed / len(dense.best), read / head.dense_bytes())


def _point_of_hnsw(index: Run, dense: DenseArgmax) -> Point:
    hits = 0
    with progress("Searching the HNSW index", len(dense.states), "positions") as advance:
        for states, best in zip(dense.states.split(STATES_AT_ONCE), dense.best.split(STATES_AT_ONCE), strict=True):
            hits += int((index(states.float()).argmax(dim=-1) == best).sum())
            advance(len(states))
    return Point(HNSW, f"{HNSW_CANDIDATES} candidates", hits / len(dense.best), None)


def as_markdown(points: list[Point]) -> str:
    """Format points as a Markdown table.

    Args:
        points: the rows, in order.
    """
    lines = ["| method | setting | agreement | bytes read | ms |", "|---|---|---|---|---|"]
    for point in points:
        read = "unknown" if point.bytes_read is None else f"{point.bytes_read:.2%}"
        time = "-" if point.milliseconds is None else f"{point.milliseconds:.2f}"
        lines.append(f"| {point.method} | {point.setting} | {point.agreement:.2%} | {read} | {time} |")
    return "\n".join(lines)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def frontier(
    model: Annotated[str, typer.Argument(metavar="CONVERTED", help="A converted model.")],
    text: Annotated[str, typer.Option(help="Text to measure on: a file, a folder, or a data set.")],
    positions: Annotated[int, typer.Option(help="Tokens to measure on.")] = POSITIONS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the points as JSON.")] = False,
) -> None:
    """Print the fewest bytes that reach each agreement, for a converted model, FlashHead, int8 and HNSW."""
    converted, dense = load_and_run(model, text, positions)
    points = measure_frontier(converted.head, dense)
    print(json.dumps([dataclasses.asdict(point) for point in points], indent=2) if as_json else as_markdown(points))


if __name__ == "__main__":
    main(app)
