"""A conversion in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import (
    QUICK,
    some_windows,
    tiny_converted,
    tiny_dense,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import PreTrainedModel

from hf_topk.convert import Recipe, Report, convert, pipeline
from hf_topk.convert.steps.find_head import head_of
from hf_topk.convert.steps.held_out import split_by_document
from hf_topk.evaluation.fidelity import measure_fidelity
from hf_topk.model.errors import InputError
from hf_topk.windows import Window


def some_states(count: int = 300) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(4))


def quick(dense: PreTrainedModel | None = None, documents: int = 12, **choices: Any) -> Report:
    windows = some_windows(documents)
    return convert(dense or tiny_dense(), tiny_tokenizer(), Recipe(**{**QUICK, **choices}), windows=windows)


@pytest.mark.parametrize("combine", ["exact", "router", "learned"])
@pytest.mark.parametrize(("k", "rescored"), [(3, 20), (3, None), (None, None), (6, 99)])
def test_every_combination_converts_and_evaluates(k: int | None, rescored: int | None, combine: str) -> None:
    report = quick(num_experts_per_tok=k, num_rescored=rescored, combine=combine, num_always_on=9)
    metrics, head = report.metrics(), report.model.head
    assert 0.2 < metrics["agreement"] <= metrics["top5_containment"] <= 1
    assert -1e-6 < metrics["kl"] < 5
    assert metrics["num_experts"] == head.num_experts == 6
    assert head.num_always_on == 9
    assert metrics["num_experts_per_tok"] == head.num_experts_per_tok == report.model.config.num_experts_per_tok
    exact = head.num_rescored if head.screens else head.num_experts_per_tok * head.expert_size
    assert metrics["num_rescored"] == exact
    assert head.num_rescored == report.model.config.num_rescored
    assert k in (None, head.num_experts_per_tok)
    assert k is None or rescored in (None, head.num_rescored)  # both are chosen together
    assert head.router.rows is None
    assert report.model.config.router_packed
    assert head.sparse_logits(some_states()).isfinite().all()
    if k == 6 and combine == "exact":
        assert (metrics["agreement"], metrics["kl"]) == (1, pytest.approx(0, abs=1e-5))


def snapshot(model: PreTrainedModel) -> dict[str, tuple[int, Tensor]]:
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("gpt2", False)])
def test_the_dense_model_is_not_changed(model_type: str, tied: bool) -> None:
    dense = tiny_dense(model_type, tied=tied)
    before, config, head = snapshot(dense), dense.config.to_dict(), dense.get_output_embeddings()
    token_ids = torch.arange(20).unsqueeze(0)
    logits = dense(token_ids).logits
    report = quick(dense=dense)
    after = snapshot(dense)
    assert dense.get_output_embeddings() is head
    assert dense.config.to_dict() == config
    assert all(parameter.requires_grad for parameter in dense.parameters())
    assert {name: place for name, (place, _) in after.items()} == {name: place for name, (place, _) in before.items()}
    assert all(torch.equal(after[name][1], tensor) for name, (_, tensor) in before.items())
    assert torch.equal(dense(token_ids).logits, logits)
    assert report.model.head.weight is head.weight
    trained = {id(parameter) for parameter in report.model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in dense.parameters()}


def test_the_same_seed_gives_the_same_model() -> None:
    dense, models = tiny_dense(), []
    for seed in (0, 0, 1):
        torch.manual_seed(len(models))  # what went before does not matter
        models.append(quick(dense=dense, seed=seed).model.head.state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert not all(torch.equal(tensor, models[2][name]) for name, tensor in models[0].items())


def test_windows_are_limited_to_the_model_s_positions() -> None:
    dense = tiny_dense("gpt2")
    report = convert(dense, tiny_tokenizer(), Recipe(**{**QUICK, "window_length": 500, "positions": 2000}))
    assert report.recipe.window_length == 128


def test_refuses_text_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs a tokenizer"):
        convert(tiny_dense(), None, Recipe(**QUICK, text=str(tmp_path)))


def test_refuses_ids_that_the_head_does_not_have() -> None:
    windows = [*some_windows(), Window(99, (1, 100))]
    with pytest.raises(InputError, match="token id 100, but the head has 100 rows"):
        convert(tiny_dense(), None, Recipe(**QUICK), windows=windows)


def test_refuses_fewer_positions_than_dimensions() -> None:
    windows = [Window(0, tuple(range(15))), Window(1, tuple(range(16)))]
    with pytest.raises(
        InputError, match="the calibration text has 31 positions, fewer than the 32 dimensions of a hidden state"
    ):
        convert(tiny_dense(), None, Recipe(**QUICK), windows=windows)
    enough = [*windows, Window(1, (1, 2))]
    assert convert(tiny_dense(), None, Recipe(**QUICK), windows=enough).fidelity.positions > 0


def test_refuses_a_converted_model() -> None:
    with pytest.raises(InputError, match="already converted"):
        head_of(tiny_converted())
    with pytest.raises(InputError, match="already converted"):
        convert(tiny_converted(), None, Recipe(**QUICK), windows=some_windows())


@pytest.mark.parametrize("name", ["router_rank", "tail_rank"])
def test_a_larger_rank_is_closer_to_the_dense_head(name: str) -> None:
    choices = {"documents": 38, "num_experts_per_tok": 3, "num_rescored": 16}
    few, many = (quick(**choices, **{name: rank}) for rank in (1, 32))
    assert many.fidelity.kl < few.fidelity.kl
    assert many.fidelity.agreement >= few.fidelity.agreement
    assert many.added_bytes > few.added_bytes


def test_metrics_are_those_of_the_model() -> None:
    report = quick(num_experts_per_tok=2)
    _, held_out = split_by_document(some_windows(), report.recipe.held_out, report.recipe.seed)
    assert measure_fidelity(report.model, held_out) == report.fidelity
    assert report.fidelity.positions == len(report.dense_argmax.best) == sum(len(one.token_ids) for one in held_out)
    assert report.distilled_positions == sum(len(one.token_ids) for one in some_windows()) - report.fidelity.positions
    assert report.added_bytes == report.model.head.added_bytes()


def test_of_many_positions_all_tell_the_agreement_and_some_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "POSITIONS_WITH_LOGITS", 30)
    report = quick(num_experts_per_tok=2, held_out=0.5)
    _, held_out = split_by_document(some_windows(), 0.5, report.recipe.seed)
    whole = measure_fidelity(report.model, held_out)
    assert report.fidelity.agreement == whole.agreement
    assert report.fidelity.agreement_lower_bound == whole.agreement_lower_bound
    assert report.fidelity.positions == whole.positions > report.observations.positions
    assert report.fidelity.kl != whole.kl


def test_agreement_by_kind_is_that_of_the_windows_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["prose", "code", "prose", "chat"]
    windows = [replace(window, kind=kinds[window.document % 4]) for window in some_windows()]
    recipe = Recipe(**{**QUICK, "num_experts_per_tok": 2, "held_out": 0.5})
    held_out = split_by_document(windows, 0.5, recipe.seed)[1]
    of_kind = {kind: [window for window in held_out if window.kind == kind] for kind in {one.kind for one in held_out}}
    fewest = sorted(sum(one.positions for one in some) for some in of_kind.values())[1]  # leaves out the shortest
    monkeypatch.setattr("hf_topk.convert.steps.held_out.FEWEST_OF_KIND", fewest)
    report = convert(tiny_dense(), None, recipe, windows=windows)
    expected = {
        kind: measure_fidelity(report.model, some).agreement
        for kind, some in of_kind.items()
        if sum(one.positions for one in some) >= fewest
    }
    assert 0 < len(expected) < len(of_kind)
    assert report.agreement_by_kind == report.metrics()["agreement_by_kind"] == expected
