"""The frontier of agreement against bytes read: every partition and router beside the oracle and the methods of others.

    python -m hf_topk.convert.frontier [MODEL] --text CALIBRATION --evaluate-on DEV

Agreement is read off the experts: a position agrees if the dense argmax is scored, since its exact logit then wins. A
tail that puts an unscored token first by chance is left out of it.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_topk.cli import main
from hf_topk.configuration_topk_experts import RouterType
from hf_topk.documents import read_documents
from hf_topk.errors import InputError
from hf_topk.head import TopKExpertsHead
from hf_topk.measure.baselines import HNSW_CANDIDATES, HnswHead, MissingPackageError
from hf_topk.measure.flashhead import CLUSTER_SIZE, FlashHead
from hf_topk.progress import progress
from hf_topk.text import make_windows

from .dense import load_dense
from .dense_head import head_of
from .distill import Masses, expert_masses, groups_of, token_statistics, without_repeats
from .features import place_tokens
from .hidden_states import HiddenStates, collect
from .misses import swap_in_missed
from .partition import partition
from .pipeline import Sample, cast_additions, config_of, distil_router
from .preflight import preflight
from .recipe import ROUTER_RANKS, PartitionType, Recipe
from .special_tokens import special_ids

EXPERTS_SCORED = (1, 2, 4, 8, 16)
PROBES = (64, 128, 256)
POSITIONS_MEASURED = 20_000
STATES_AT_ONCE = 256
FLASHHEAD, HNSW = "FlashHead", "HNSW"
ORACLE = "oracle"


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting and what it reaches.

    Attributes:
        partition: the feature that experts come from; "directions" for FlashHead, "none" for HNSW.
        expert_size: S.
        num_always_on: A.
        router: kind of router, "oracle" for the true log-sum-exp, "FlashHead" for unit-norm centroids, or "HNSW" for an
            index of nearest neighbours.
        num_experts_per_tok: k, experts scored, clusters probed, or candidates.
        agreement: share of positions whose dense argmax is scored.
        mass_covered: mean dense probability of the tokens that are scored.
        bytes_read: share of the dense head's bytes; the oracle's are its scored rows alone, and how many rows an index
            looks at is not known.
    """

    partition: str
    expert_size: int
    num_always_on: int
    router: str
    num_experts_per_tok: int
    agreement: float
    mass_covered: float
    bytes_read: float | None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured on.

    Attributes:
        states: hidden states, [N, d].
        best: the dense argmax at each, int64 [N].
        log_sums: log-sum-exp of the dense logits at each, fp32 [N].
    """

    states: Tensor
    best: Tensor
    log_sums: Tensor

    @classmethod
    def of(cls, states: Tensor, head: nn.Linear) -> "Measured":
        """Find dense argmax and log-sum-exp, from logits in fp32."""
        weight, bias = head.weight.detach().float(), None if head.bias is None else head.bias.detach().float()
        best, log_sums = [], []
        with progress("Reading the dense argmax", len(states), "positions") as advance:
            for some in states.split(STATES_AT_ONCE):
                logits = F.linear(some.to(weight), weight, bias)
                best.append(logits.argmax(dim=-1).cpu())
                log_sums.append(logits.logsumexp(dim=-1).cpu())
                advance(len(some))
        return cls(states, torch.cat(best), torch.cat(log_sums))


@torch.no_grad()
def measure_frontier(
    dense: PreTrainedModel, recipe: Recipe, specials: list[int], states: Tensor, measured: Measured
) -> Iterator[Point]:
    """Distil every router on every partition and measure it at each k.

    Args:
        dense: the dense model.
        recipe: resolved; its partition, router and tail are replaced by each in turn. Rows are also tried without
            always-on tokens.
        specials: ids of special tokens, the most important first.
        states: hidden states to distil on, [N, d].
        measured: what is measured on.

    Yields:
        Points, partition by partition, router by router, the oracle behind the routers; FlashHead's then, and those of
        HNSW if hnswlib is installed.
    """
    head = head_of(dense)
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    statistics = token_statistics(states, weight, bias)
    cases = [dataclasses.replace(recipe, partition=one, tail="prior") for one in get_args(PartitionType)]
    for case in [*cases, dataclasses.replace(cases[0], num_always_on=0)]:
        placed = TopKExpertsHead(head, config_of(dense, case))
        reserved = place_tokens(placed, case, specials, statistics)
        masses = expert_masses(states, weight, bias, groups_of(placed))
        for router in (*get_args(RouterType), ORACLE):
            own = Masses(masses.log_sums.clone(), masses.best)
            routed = _routed_head(dense, case, router, placed, Sample(states, own, statistics.probabilities, reserved))
            yield from _points_of_router(case, router, routed, measured)
    yield from _points_of_flashhead(weight, bias, recipe.seed, measured)
    try:
        yield point_of_hnsw(HnswHead(weight, bias), measured)
    except MissingPackageError as error:
        print(f"{HNSW} is left out: {error}", file=sys.stderr)


def _routed_head(
    dense: PreTrainedModel, case: Recipe, router: str, placed: TopKExpertsHead, sample: Sample
) -> TopKExpertsHead:
    """A head whose tokens are placed as another's, with a router distilled or, for the oracle, computed."""
    recipe = case if router == ORACLE else _with_router(case, router)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # of what a router starts from
        head = TopKExpertsHead(head_of(dense), config_of(dense, recipe))
    head.always_on_ids.copy_(placed.always_on_ids)
    head.expert_ids.copy_(placed.expert_ids)
    if router == ORACLE:
        head.router = cast(Any, _TrueMasses(head))
        swap_in_missed(head, sample.states, sample.masses.best, sample.probabilities, sample.reserved)
    else:
        distil_router(head, recipe, sample)
        cast_additions(head)
    return head


def _with_router(case: Recipe, router: Any) -> Recipe:
    return dataclasses.replace(case, router=router, router_rank=ROUTER_RANKS[router])


class _TrueMasses(nn.Module):
    """The oracle: scores are the dense log-sum-exp of each expert as it is at first."""

    def __init__(self, head: TopKExpertsHead) -> None:
        super().__init__()
        self.weight, self.bias, self.groups = head.weight, head.bias, groups_of(head)[: head.num_experts]

    def forward(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias).float()
        return torch.stack([logits[:, ids].logsumexp(dim=-1) for ids in self.groups], dim=-1)


def _points_of_router(case: Recipe, router: str, head: TopKExpertsHead, measured: Measured) -> Iterator[Point]:
    groups = groups_of(head)
    true_masses = expert_masses(measured.states, head.weight, head.bias, groups).log_sums
    is_oracle = router == ORACLE
    states = () if is_oracle else measured.states.split(STATES_AT_ONCE)
    scores = [head.router(some.to(head.weight)).cpu() for some in states]
    ks = [k for k in EXPERTS_SCORED if k <= head.num_experts]
    found = coverage(
        true_masses[:, : head.num_experts] if is_oracle else torch.cat(scores), ks, true_masses, groups, measured.best
    )
    for k, reached in zip(ks, found, strict=True):
        head.num_experts_per_tok = k
        rows = (head.num_always_on + k * case.expert_size) / head.out_features
        bytes_read = rows if is_oracle else head.bytes_read() / head.dense_bytes()
        yield Point(case.partition, case.expert_size, head.num_always_on, router, k, *reached, bytes_read)


def _points_of_flashhead(weight: Tensor, bias: Tensor | None, seed: int, measured: Measured) -> Iterator[Point]:
    cluster_ids = partition(F.normalize(weight.float(), dim=-1), min(CLUSTER_SIZE, len(weight)), seed)
    head = FlashHead(weight, bias, cluster_ids.to(weight.device))
    groups = without_repeats(cluster_ids)
    true_masses = expert_masses(measured.states, weight, bias, groups).log_sums
    scores = torch.cat([head.scores(some).cpu() for some in measured.states.split(STATES_AT_ONCE)])
    probes = sorted({head.num_probes, *(some for some in PROBES if some <= len(groups))})
    for p, reached in zip(probes, coverage(scores, probes, true_masses, groups, measured.best), strict=True):
        head.num_probes = p
        dense_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        yield Point("directions", cluster_ids.shape[1], 0, FLASHHEAD, p, *reached, head.bytes_read() / dense_bytes)


def point_of_hnsw(head: HnswHead, measured: Measured) -> Point:
    """What an index of nearest neighbours finds.

    Args:
        head: the index.
        measured: what is measured on.
    """
    hits, mass = 0.0, 0.0
    blocks = zip(
        *(one.split(STATES_AT_ONCE) for one in (measured.states, measured.best, measured.log_sums)), strict=True
    )
    with progress("Searching the HNSW index", len(measured.states), "positions") as advance:
        for states, best, log_sums in blocks:
            logits = head(states.float())
            hits += float((logits.argmax(dim=-1) == best).sum())
            mass += float((logits.logsumexp(dim=-1) - log_sums).exp().sum())
            advance(len(states))
    count = len(measured.states)
    return Point("none", 1, 0, HNSW, HNSW_CANDIDATES, hits / count, mass / count, None)


def coverage(
    scores: Tensor, ks: list[int], masses: Tensor, groups: list[Tensor], best: Tensor
) -> list[tuple[float, float]]:
    """What is covered when the experts of the k highest scores are picked.

    Args:
        scores: [N, M].
        ks: numbers of experts to pick, ascending.
        masses: log-sum-exp of the dense logits of each group, [N, number of groups].
        groups: token ids of each of M experts and, behind them, of the always-on tokens if there are any.
        best: dense argmax of each position, int64 [N].

    Returns:
        For each k the share of positions whose dense argmax is scored, and the mean dense probability of what is.
    """
    num_experts = scores.shape[1]
    picked = scores.topk(ks[-1], dim=-1).indices
    home = torch.empty(sum(map(len, groups)), dtype=torch.long)
    for number, ids in enumerate(groups):
        home[ids.cpu()] = number
    expert = home[best].unsqueeze(-1)
    is_scored = (expert >= num_experts) | ((picked == expert).cumsum(dim=-1) > 0)  # (N, largest k)
    shares = masses.softmax(dim=-1)
    mass = shares[:, num_experts:].sum(dim=-1, keepdim=True) + shares.gather(1, picked).cumsum(dim=-1)
    return [(float(is_scored[:, k - 1].float().mean()), float(mass[:, k - 1].mean())) for k in ks]


def as_markdown(points: list[Point]) -> str:
    """Points as Markdown: a table of partitions and routers by k, one of FlashHead's probes, and one of HNSW.

    Args:
        points: in the order in which they were measured.
    """
    ours: dict[tuple[str, ...], dict[int, Point]] = {}
    theirs: dict[str, dict[int, Point]] = {}
    for point in points:
        if point.router in (FLASHHEAD, HNSW):
            theirs.setdefault(point.router, {})[point.num_experts_per_tok] = point
        else:
            key = (f"`{point.partition}`", str(point.num_always_on), point.router)
            ours.setdefault(key, {})[point.num_experts_per_tok] = point
    parts = [
        "Agreement / mass covered / bytes read, in %:",
        _table(("partition", "always-on tokens", "router"), "k", ours),
    ]
    for router, counted in ((FLASHHEAD, "clusters probed"), (HNSW, "candidates")):
        if router in theirs:
            parts += [f"{router}'s method:", _table((), counted, {(): theirs[router]})]
    return "\n\n".join(parts)


def _table(names: tuple[str, ...], counted: str, rows: dict[tuple[str, ...], dict[int, Point]]) -> str:
    counts = sorted({count for row in rows.values() for count in row})
    lines = [[*names, *(f"{counted} = {count}" for count in counts)], ["---"] * (len(names) + len(counts))]
    lines += [[*key, *(_cell(row[count]) if count in row else "" for count in counts)] for key, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(point: Point) -> str:
    bytes_read = "unknown" if point.bytes_read is None else f"{100 * point.bytes_read:.1f}"
    return f"{100 * point.agreement:.2f} / {100 * point.mass_covered:.1f} / {bytes_read}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def frontier(
    text: Annotated[str, typer.Option(help="Sample text to distil on: a file, a folder, or a data set.")],
    evaluate_on: Annotated[str, typer.Option(help="Other text, to measure on.")],
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The dense model; the bundled one if left out.")
    ] = None,
    positions: Annotated[int, typer.Option(help="Tokens of the sample to distil on.")] = Recipe.positions,
    positions_measured: Annotated[int, typer.Option(help="Tokens to measure on.")] = POSITIONS_MEASURED,
    expert_size: Annotated[int, typer.Option(help="Tokens in an expert.")] = Recipe.expert_size,
    distill_steps: Annotated[int, typer.Option(help="Training steps of each router.")] = Recipe.distill_steps,
    as_json: Annotated[bool, typer.Option("--json", help="Print the points as JSON.")] = False,
) -> None:
    """Print what every partition and router reaches at each k, beside the oracle, FlashHead's method and HNSW."""
    recipe = Recipe.from_dict(
        {"text": text, "positions": positions, "expert_size": expert_size, "distill_steps": distill_steps}
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        plan = preflight(model, folder / "not-written", recipe)
        if plan.windows is None or plan.tokenizer is None:
            raise InputError("the frontier is measured on text: give --text a file, a folder or a data set")
        dense = load_dense(plan.source)
        measured_windows = make_windows(
            read_documents(evaluate_on), plan.tokenizer, plan.recipe.window_length, positions_measured, seed=0
        )
        kept = [HiddenStates.open(folder / name, head_of(dense).in_features, dense.dtype) for name in ("one", "other")]
        states = collect(dense, plan.windows, kept[0])
        measured = Measured.of(collect(dense, measured_windows, kept[1]), head_of(dense))
        specials = special_ids(dense, plan.tokenizer, plan.recipe.num_always_on or 0)
        points = list(measure_frontier(dense, plan.recipe, specials, states, measured))
    print(json.dumps([dataclasses.asdict(point) for point in points], indent=2) if as_json else as_markdown(points))


if __name__ == "__main__":
    main(app)
