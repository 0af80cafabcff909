"""The study of target agreements on unseen documents: `make study NAME=promise`."""

import json
from pathlib import Path

import pytest
import torch
from support.tiny_models import QUICK, tiny_checkpoint, tiny_converted, tiny_text
from torch.nn import functional as F

from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.convert.steps.choose_operating_point import agrees, rank_argmax
from hf_topk.convert.steps.held_out import DenseArgmax
from hf_topk.model.errors import InputError
from studies import promise


def random_argmax(model: object, documents: int) -> DenseArgmax:
    head = model.head
    states = torch.randn(40 * documents, head.in_features, generator=torch.Generator().manual_seed(5))
    best = F.linear(states, head.weight.detach()).argmax(dim=-1)
    return DenseArgmax(states, best, torch.arange(documents).repeat_interleave(40), torch.zeros_like(best))


def test_the_summary_covers_all_splits() -> None:
    outcomes = [promise.Outcome(3, 20, 0.91, 0.94, 10), promise.Outcome(5, 20, 0.9, 0.88, 10)]
    assert promise.summary(outcomes, 0.9) == {
        "splits": 2,
        "kept": 1,
        "num_experts_per_tok_median": 4,
        "num_experts_per_tok_min": 3,
        "num_experts_per_tok_max": 5,
        "agreement_median": pytest.approx(0.91),
        "agreement_min": 0.88,
        "agreement_max": 0.94,
    }


def test_a_split_is_measured_on_other_documents_than_it_was_chosen_on() -> None:
    model = tiny_converted(num_always_on=4)
    dense = random_argmax(model, 8)
    ranks = rank_argmax(model.head, dense)
    asked: list[DenseArgmax] = []

    def watched(model: object, some: DenseArgmax, *others: object) -> None:
        asked.append(some)
        promise_choose(model, some, *others)

    promise_choose = promise.choose_operating_point
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(promise, "choose_operating_point", watched)
        outcome = promise.try_split(model, dense, ranks, 0.8, seed=3)
    (seen,) = asked
    is_seen = (dense.states.unsqueeze(1) == seen.states[::40]).all(dim=-1).any(dim=1)  # the first of each document
    assert outcome.positions == len(seen.best) == 160
    others = dense.part(~torch.isin(dense.documents, dense.documents[is_seen]))
    assert len(others.best) == 160
    assert outcome.agreement == float(agrees(model.head, others).double().mean())
    assert outcome.bound == seen.bound(agrees(model.head, seen)) >= 0.8
    assert (outcome.num_experts_per_tok, outcome.num_rescored) == (model.num_experts_per_tok, model.head.num_rescored)
    assert promise.try_split(model, dense, ranks, 0.8, seed=3) == outcome


def test_too_few_documents_are_refused() -> None:
    model = tiny_converted()
    dense = random_argmax(model, 3)
    with pytest.raises(InputError, match="3 documents, too few to split"):
        promise.try_split(model, dense, rank_argmax(model.head, dense), 0.9, seed=0)


def test_the_command_prints_a_line_for_each_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(tiny_text(tmp_path / "text.jsonl", documents=8))
    recipe = Recipe.from_dict({**QUICK, "text": text})
    convert_checkpoint(str(tiny_checkpoint(tmp_path / "model")), str(tmp_path / "out"), recipe)
    capsys.readouterr()
    promise.promise(str(tmp_path / "out"), text, target_agreement=0.5, positions=400, splits=2)
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["split"] for line in lines] == [0, 1]
    assert last["splits"] == 2
    assert last["kept"] == sum(line["is_kept"] for line in lines)
