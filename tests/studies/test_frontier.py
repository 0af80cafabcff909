"""The frontier: its points against plain references, and the command that prints them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_checkpoint, tiny_converted, tiny_text
from torch.nn import functional as F

from hf_topk.cli import main
from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.convert.steps.held_out import DenseArgmax
from hf_topk.model.head import TopKExpertsHead
from studies import frontier
from studies.frontier import DENSE, FLASHHEAD, HNSW, INT8, LEVELS, OURS, Point, as_markdown, measure_frontier


@pytest.fixture(scope="module")
def head() -> TopKExpertsHead:
    return tiny_converted(num_always_on=8).head


@pytest.fixture(scope="module")
def choices(head: TopKExpertsHead) -> DenseArgmax:
    states = torch.randn(200, head.in_features, generator=torch.Generator().manual_seed(5))
    best = F.linear(states, head.weight.detach(), head.bias).argmax(dim=-1)
    return DenseArgmax(states, best, torch.zeros_like(best), torch.zeros_like(best))


@pytest.fixture(scope="module")
def points(head: TopKExpertsHead, choices: DenseArgmax) -> list[Point]:
    return measure_frontier(head, choices)


def of(points: list[Point], method: str) -> list[Point]:
    return [point for point in points if point.method == method]


@pytest.mark.parametrize("method", [OURS, FLASHHEAD])
def test_a_higher_level_reads_no_fewer_bytes(points: list[Point], method: str) -> None:
    found = of(points, method)
    assert len(found) == len(LEVELS)
    for level, point in zip(LEVELS, found, strict=True):
        assert level <= point.agreement <= 1
    read = [point.bytes_read for point in found]
    assert read == sorted(read)
    assert read[0] > 0


def test_a_point_has_the_agreement_of_the_head_with_its_k_and_r(
    head: TopKExpertsHead, choices: DenseArgmax, points: list[Point]
) -> None:
    for point in of(points, OURS):
        k, rescored = (int(part.split(" = ")[1]) for part in point.setting.split(", "))
        head.num_experts_per_tok, head.num_rescored = k, rescored
        agreed = (head.score(choices.states).ids == choices.best.unsqueeze(-1)).any(dim=-1)
        assert point.agreement == pytest.approx(float(agreed.double().mean()), abs=0.011)  # where estimates are equal
        assert point.bytes_read == pytest.approx(head.bytes_read() / head.dense_bytes())


def test_int8_reads_a_quarter_of_float32_and_agrees_mostly(head: TopKExpertsHead, points: list[Point]) -> None:
    (point,) = of(points, INT8)
    assert point.bytes_read == pytest.approx(1 / 4 + 1 / head.in_features)
    assert 0.9 < point.agreement <= 1


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["frontier", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main(frontier.app)
    return caught.value.code


def test_the_command_prints_json_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_text(tmp_path / "text.jsonl")
    recipe = Recipe(text=str(text), positions=300, num_experts_per_tok=2, num_always_on=4, distill_steps=5)
    convert_checkpoint(str(tiny_checkpoint(tmp_path / "model")), str(tmp_path / "out"), recipe)
    capsys.readouterr()
    options = (tmp_path / "out", "--text", text, "--positions", 60)
    assert run(monkeypatch, *options, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed[0]) == list(Point.__dataclass_fields__)
    assert {point["method"] for point in printed} - {HNSW} == {DENSE, OURS, FLASHHEAD, INT8}
    assert all(point["milliseconds"] > 0 for point in printed if point["method"] != INT8)
    assert run(monkeypatch, *options) == 0
    table = capsys.readouterr().out.strip()
    assert [line.rsplit("|", 2)[0] for line in table.splitlines()[2:]] == [
        line.rsplit("|", 2)[0] for line in as_markdown([Point(**point) for point in printed]).splitlines()[2:]
    ]
