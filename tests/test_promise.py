"""Whether a target agreement is kept on documents that nothing has seen: `python -m hf_topk.convert.promise`."""

import json
from pathlib import Path

import pytest
import torch
from helpers import QUICK, VOCAB_SIZE, tiny_checkpoint, tiny_dense, tiny_text

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import pipeline, promise
from hf_topk.convert.recipe import Recipe
from hf_topk.measure.fidelity import Fidelity, measure_fidelity
from hf_topk.text import Window


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_checkpoint(tmp_path / "model")
    tiny_text(tmp_path / "text.jsonl", documents=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_promise_is_summed_up_over_splits(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = iter([promise.Outcome(3, 0.91, 0.94, 10), promise.Outcome(5, 0.9, 0.88, 10)])
    splits: list[tuple[int, int]] = []

    def try_split(_: object, __: object, recipe: Recipe, windows: list[Window], seed: int) -> promise.Outcome:
        splits.append((seed, len({window.document for window in windows})))
        assert recipe.target_agreement == 0.9
        return next(outcomes)

    monkeypatch.setattr(promise, "try_split", try_split)
    promise.promise("model", "text.jsonl", target_agreement=0.9, positions=1600, splits=2)
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert splits == [(0, 8), (1, 8)]
    assert lines[0] == {
        "split": 0,
        "num_experts_per_tok": 3,
        "bound": 0.91,
        "agreement": 0.94,
        "positions": 10,
        "is_kept": True,
    }
    assert not lines[1]["is_kept"]
    assert last == {
        "splits": 2,
        "kept": 1,
        "num_experts_per_tok_median": 4,
        "num_experts_per_tok_min": 3,
        "num_experts_per_tok_max": 5,
        "agreement_median": pytest.approx(0.91),
        "agreement_min": 0.88,
        "agreement_max": 0.94,
    }


def test_a_split_is_measured_on_documents_that_nothing_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    windows = [
        Window(document, tuple(torch.randint(VOCAB_SIZE, (32,), generator=generator).tolist()))
        for document in range(20)
        for _ in range(2)
    ]
    seen: list[set[int]] = []

    def watched(model: TopKExpertsForCausalLM, some: list[Window]) -> Fidelity:
        seen.append({window.document for window in some})
        return measure_fidelity(model, some)

    monkeypatch.setattr(promise, "measure_fidelity", watched)
    monkeypatch.setattr(pipeline, "measure_fidelity", watched)
    recipe = Recipe.from_dict({**QUICK, "held_out": 0.25, "target_agreement": 0.9, "allow_below_target": True})
    outcome = promise.try_split(tiny_dense(), None, recipe, windows, 0)
    held_out, tested = seen[0], seen[-1]
    assert (len(held_out), len(tested)) == (4, 4)
    assert not held_out & tested
    assert outcome.positions == 4 * 64
    assert 1 <= outcome.num_experts_per_tok <= 6
    assert outcome.agreement >= 0.9
    assert promise.try_split(tiny_dense(), None, recipe, windows, 0) == outcome
