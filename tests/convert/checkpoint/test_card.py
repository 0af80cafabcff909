"""The model card: its metrics are the measured ones, and its metadata is valid on the Hub."""

import dataclasses
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from support.tiny_models import QUICK, tiny_checkpoint, tiny_text
from transformers import AutoTokenizer

from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.convert.checkpoint import agreement_plot
from hf_topk.convert.checkpoint.agreement_plot import Point, draw, measure_around
from hf_topk.convert.checkpoint.card import write_card
from hf_topk.convert.load_calibration_text import calibration_windows
from hf_topk.convert.source import open_source
from hf_topk.convert.steps.held_out import split_by_document
from hf_topk.model.hub_card import named

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("made")
    tiny_checkpoint(folder / "model")
    recipe = Recipe(text=str(tiny_text(folder / "text.jsonl")), num_experts_per_tok=2, **QUICK)
    report = convert_checkpoint(str(folder / "model"), folder / "out", recipe)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    _, held_out = split_by_document(calibration_windows(tokenizer, recipe)[0], recipe.held_out, recipe.seed)
    card = ModelCard.load(folder / "out" / "README.md")
    return SimpleNamespace(folder=folder, report=report, held_out=held_out, card=card)


def card_of(made: SimpleNamespace, dense: Path, name: str | None = None) -> ModelCard:
    """The card of a conversion of a copy of the dense model."""
    shutil.copytree(made.folder / "model", dense, dirs_exist_ok=True)
    (dense.parent / "out").mkdir(exist_ok=True)
    source = dataclasses.replace(open_source(str(dense), dense), name=name or str(dense))
    write_card(made.report, source, dense.parent / "out")
    return ModelCard.load(dense.parent / "out" / "README.md")


def test_the_results_are_the_metrics(made: SimpleNamespace) -> None:
    metrics = made.report.metrics()
    results = {result.metric_type: result for result in made.card.data.eval_results}
    for kind, key in (("agreement", "agreement"), ("perplexity", "perplexity_sparse"), ("bytes_read", "bytes_read")):
        assert results[kind].metric_value == pytest.approx(metrics[key], abs=1e-4)
        assert results[kind].task_type == "text-generation"
        assert results[kind].dataset_name == "held-out part of text.jsonl"
    assert made.card.data.model_name == "model-topk"
    assert made.card.data.pipeline_tag == "text-generation"


def test_the_recipe_is_yaml_in_the_card(made: SimpleNamespace) -> None:
    block = re.search(r"```yaml\n(.*?)```", made.card.text, re.DOTALL)[1]
    assert yaml.safe_load(block) == {**made.report.recipe.to_dict(), "text": "text.jsonl"}


def test_the_snippets_run(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    text = named((made.folder / "out" / "README.md").read_text(), "out")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 3
    assert "trust_remote_code=True" in snippets[1]
    monkeypatch.chdir(made.folder)
    for number in (0, 2):  # the other one is for where there is no package
        found: dict[str, Any] = {}
        exec(snippets[number].replace("64", "2"), found)
        assert ("model" in found) != ("dense" in found)


def test_a_local_folder_is_not_named_as_base_model(made: SimpleNamespace) -> None:
    assert made.card.data.base_model is None
    assert (made.card.data.license, made.card.data.language) == ("mit", "en")


def test_the_base_model_comes_from_the_dense_card(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    shutil.copytree(made.folder / "model", tmp_path / "dense", dirs_exist_ok=True)
    metadata = "license: other\nlicense_name: gemma\nlicense_link: https://x.org/terms\nbase_model: them/first"
    (tmp_path / "dense" / "README.md").write_text(f"---\n{metadata}\n---\n# tuned\n")
    write_card(made.report, open_source(str(tmp_path / "dense"), tmp_path / "dense"), tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "them/first"
    assert (data.license, data.license_name, data.license_link) == ("other", "gemma", "https://x.org/terms")


@pytest.mark.parametrize("name", ["them/first", None])
def test_a_repository_is_the_base_model(made: SimpleNamespace, tmp_path: Path, name: str | None) -> None:
    """Given by name, or as a folder in the Hub's cache."""
    card = card_of(made, tmp_path / "models--them--first" / "snapshots" / "0123", name)
    assert card.data.base_model == "them/first"
    assert "[them/first](https://huggingface.co/them/first)" in card.text
    assert 'from_pretrained("first-topk")' in card.text


@pytest.mark.parametrize("readme", [None, "no metadata", "---\n- a list\n---\n", "---\nlicense: [\n---\n"])
def test_an_unreadable_dense_card_is_ignored(made: SimpleNamespace, tmp_path: Path, readme: str | None) -> None:
    dense = shutil.copytree(made.folder / "model", tmp_path / "dense")
    (dense / "README.md").unlink()
    if readme:
        (dense / "README.md").write_text(readme)
    write_card(made.report, open_source(str(dense), dense), tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.license is None


# The plot


def test_the_curve_is_measured_around_k(made: SimpleNamespace) -> None:
    report = made.report
    curve, head = report.curve, report.model.head
    assert [point.num_experts_per_tok for point in curve] == [1, 2, 4, head.num_experts]
    fidelity = report.fidelity
    assert curve[1] == Point(2, fidelity.agreement, fidelity.bytes_read, fidelity.positions)
    assert curve[-1].agreement == 1  # which is the dense head
    for below, above in pairwise(curve):
        assert below.bytes_read < above.bytes_read
        assert below.agreement <= above.agreement
    assert curve[0].agreement < 1
    assert head.num_experts_per_tok == report.model.config.num_experts_per_tok == 2
    metrics = json.loads((made.folder / "out" / "figures.json").read_text())
    assert [Point(**point) for point in metrics["curve"]] == curve


def test_each_point_equals_fidelity_at_its_k(made: SimpleNamespace) -> None:
    from hf_topk.evaluation.fidelity import measure_fidelity

    model = made.report.model
    for point in made.report.curve:
        model.num_experts_per_tok = point.num_experts_per_tok
        fidelity = measure_fidelity(model, made.held_out)
        assert (point.agreement, point.bytes_read) == (fidelity.agreement, fidelity.bytes_read)
    model.num_experts_per_tok = 2


def test_of_a_long_text_a_sample_is_measured(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    total = made.report.fidelity.positions
    monkeypatch.setattr(agreement_plot, "POSITIONS", total // 3)
    curve = measure_around(made.report.model, made.report.dense_argmax)
    assert 0 < curve[0].positions <= total // 2


def test_the_plot_has_every_point(made: SimpleNamespace) -> None:
    image = ElementTree.parse(made.folder / "out" / "agreement.svg").getroot()
    assert len(image.findall(f"{SVG}circle")) == len(made.report.curve)
    texts = [text.text for text in image.findall(f"{SVG}text")]
    for point in made.report.curve:
        assert f"k = {point.num_experts_per_tok}" in texts
    assert "](agreement.svg)" in made.card.text


@pytest.mark.parametrize(
    "points",
    [
        [Point(1, 0.5, 0.1, 100)],
        [Point(1, 1.0, 0.1, 100), Point(2, 1.0, 0.2, 100)],
        [Point(1, 0.0, 0.1, 100), Point(2, 1.0, 1.5, 100)],
        [Point(8, 0.9991, 0.120001, 100), Point(16, 0.9992, 0.120002, 100)],
    ],
)
def test_points_are_drawn_in_their_order_within_the_image(points: list[Point]) -> None:
    image = ElementTree.fromstring(draw(points, 1))
    places = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in image.findall(f"{SVG}circle")]
    for x, y in places:
        assert 0 < x < float(image.get("width"))
        assert 0 < y < float(image.get("height"))
    for (left, low), (right, high) in pairwise(places):
        assert left < right
        assert low >= high
    assert len(image.findall(f"{SVG}text")) < 40


# The name in the snippets


def test_a_card_is_named_after_its_repository() -> None:
    snippets = 'A.from_pretrained("here") B.from_pretrained("out") C.from_pretrained("other")'
    ours = 'A.from_pretrained("me/x") B.from_pretrained("me/x") C.from_pretrained("other")'
    assert named(f"---\nlicense: mit\n---\n# here\n{snippets}", "me/x", "out").endswith(ours)
    assert named("no heading", "me/x", None) == "no heading"
