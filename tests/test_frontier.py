"""The frontier: what is covered beside a count by hand, its points, and the command that prints them."""

import json
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers import VOCAB_SIZE, tiny_checkpoint, tiny_converted, tiny_dense, tiny_text
from torch import Tensor
from torch.nn import functional as F

from hf_topk.cli import main
from hf_topk.configuration_topk_experts import RouterType
from hf_topk.convert import Recipe, frontier
from hf_topk.convert.distill import expert_masses, groups_of
from hf_topk.convert.frontier import FLASHHEAD, HNSW, ORACLE, Measured, Point, as_markdown, coverage, measure_frontier
from hf_topk.convert.recipe import PartitionType

ROUTERS, PARTITIONS = get_args(RouterType), get_args(PartitionType)


def some_states(count: int = 120, seed: int = 4) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("num_always_on", "num_experts"), [(0, 7), (8, 6)])
def test_coverage_is_a_count_of_what_is_scored(num_always_on: int, num_experts: int) -> None:
    head = tiny_converted(num_always_on=num_always_on, num_experts=num_experts, router_type="centroid").head
    states = some_states(40)
    groups = groups_of(head)
    scores = torch.randn(40, num_experts, generator=torch.Generator().manual_seed(7))
    probabilities = F.linear(states, head.weight.detach()).softmax(dim=-1)
    best = probabilities.argmax(dim=-1)
    masses = expert_masses(states, head.weight.detach(), None, groups).log_sums
    found = coverage(scores, [1, 3, num_experts], masses, groups, best)
    for k, (agreement, mass) in zip([1, 3, num_experts], found, strict=True):
        agreed, covered = [], []
        for p, token, row in zip(probabilities, best.tolist(), scores, strict=True):
            picked = sorted(range(num_experts), key=row.__getitem__)[-k:]
            scored = {token for expert in picked for token in groups[expert].tolist()}
            scored |= set(head.always_on_ids.tolist())
            agreed.append(token in scored)
            covered.append(float(p[sorted(scored)].sum()))
        assert agreement == pytest.approx(sum(agreed) / 40)
        assert mass == pytest.approx(sum(covered) / 40, abs=1e-5)
    assert found[-1] == (1.0, pytest.approx(1.0, abs=1e-5))


def measured_points() -> list[Point]:
    dense = tiny_dense()
    recipe = Recipe(expert_size=16, num_always_on=4, distill_steps=30).resolve(VOCAB_SIZE)
    measured = Measured.of(some_states(60, seed=5), dense.get_output_embeddings())
    return list(measure_frontier(dense, recipe, [0, 1], some_states(), measured))


def test_the_points_cover_every_partition_and_router() -> None:
    points = measured_points()
    ours = [point for point in points if point.router not in (FLASHHEAD, HNSW)]
    settings = list(dict.fromkeys((point.partition, point.num_always_on, point.router) for point in ours))
    cases = [*((one, 4) for one in PARTITIONS), ("rows", 0)]
    assert settings == [(*case, router) for case in cases for router in (*ROUTERS, ORACLE)]
    assert {point.num_experts_per_tok for point in ours} == {1, 2, 4}  # there are 6 or 7 experts
    assert [point.num_experts_per_tok for point in points if point.router == FLASHHEAD] == [1]  # of 7 clusters
    for setting in settings:
        row = [point for point in ours if (point.partition, point.num_always_on, point.router) == setting]
        for name in ("agreement", "mass_covered", "bytes_read"):
            values = [getattr(point, name) for point in row]
            assert values == sorted(values)
            assert values[0] > 0
            assert values[-1] <= 1 or name == "bytes_read"  # tiny routers are larger than a tiny head
    oracle = {(p.partition, p.num_always_on, p.num_experts_per_tok): p for p in ours if p.router == ORACLE}
    for point in ours:
        best = oracle[point.partition, point.num_always_on, point.num_experts_per_tok]
        assert point.mass_covered <= best.mass_covered + 1e-6  # none picks more mass than the true masses do
        assert point.bytes_read > best.bytes_read or point is best
    assert oracle["rows", 4, 2].bytes_read == (4 + 2 * 16) / VOCAB_SIZE


def test_a_markdown_table_has_a_row_for_each_router() -> None:
    points = [
        Point("rows", 128, 256, "mlp", 4, 0.99154, 0.92349, 0.0456),
        Point("rows", 128, 256, "mlp", 8, 0.99704, 0.95349, 0.0656),
        Point("rows", 128, 0, "oracle", 4, 0.5, 0.25, 0.125),
        Point("directions", 16, 0, FLASHHEAD, 128, 0.984, 0.9, 0.125),
        Point("none", 1, 0, HNSW, 50, 0.98, 0.5, None),
    ]
    lines = as_markdown(points).splitlines()
    assert "| partition | always-on tokens | router | k = 4 | k = 8 |" in lines
    assert "| `rows` | 256 | mlp | 99.15 / 92.3 / 4.6 | 99.70 / 95.3 / 6.6 |" in lines
    assert "| `rows` | 0 | oracle | 50.00 / 25.0 / 12.5 |  |" in lines
    assert "| 98.40 / 90.0 / 12.5 |" in lines
    assert lines[-1] == "| 98.00 / 50.0 / unknown |"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["frontier", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main(frontier.app)
    return caught.value.code


def test_the_command_prints_json_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = tiny_checkpoint(tmp_path / "model"), tiny_text(tmp_path / "text.jsonl")
    options = (model, "--text", text, "--evaluate-on", text, "--positions", 300, "--positions-measured", 50)
    options = (*options, "--expert-size", 16, "--distill-steps", 5)
    assert run(monkeypatch, *options, "--json") == 0
    printed = capsys.readouterr()
    points = json.loads(printed.out)
    assert list(points[0]) == list(Point.__dataclass_fields__)
    assert {point["router"] for point in points} - {HNSW} == {*ROUTERS, ORACLE, FLASHHEAD}
    assert "Distilling the router" in printed.err
    assert run(monkeypatch, *options) == 0
    assert capsys.readouterr().out.strip() == as_markdown([Point(**point) for point in points])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.jsonl"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--text", "mixed"), "the frontier is measured on text"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--text", "text.jsonl", "--expert-size", 0), "expert_size is 0"),
    ],
)
def test_refuses_in_one_line(
    options: tuple[object, ...],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model, text = tiny_checkpoint(tmp_path / "model"), tiny_text(tmp_path / "text.jsonl")
    capsys.readouterr()  # what saving printed
    defaults = ("--positions", 300, "--expert-size", 16)
    assert run(monkeypatch, model, "--evaluate-on", text, *defaults, *options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert reason in printed.err
