"""The steps of a conversion in memory, against plain references."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import (
    CHAT_TEMPLATE,
    QUICK,
    VOCAB_SIZE,
    some_windows,
    tiny_converted,
    tiny_dense,
    tiny_text,
    tiny_tokenizer,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_topk.convert import Recipe, Report, convert
from hf_topk.convert.load_calibration_text import PROMPTS, TEXTS, bundled_documents, calibration_windows
from hf_topk.convert.steps import distill as distillation
from hf_topk.convert.steps.choose_operating_point import split_by_document
from hf_topk.convert.steps.distill import expert_masses, groups_of, start_router, token_statistics, train_router
from hf_topk.convert.steps.find_head import head_of
from hf_topk.convert.steps.fit_combiner import fit_combiner
from hf_topk.convert.steps.fit_packed_rows import TEMPER, fit_tail, metric_of
from hf_topk.convert.steps.hidden_states import HiddenStates, collect
from hf_topk.documents import read_documents
from hf_topk.evaluation.fidelity import measure_fidelity
from hf_topk.model.errors import InputError
from hf_topk.model.head import TopKExpertsHead
from hf_topk.windows import Window, batches_of


def some_states(count: int = 300) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(4))


def quick(dense: PreTrainedModel | None = None, **choices: Any) -> Report:
    return convert(dense or tiny_dense(), tiny_tokenizer(), Recipe(**{**QUICK, **choices}), windows=some_windows())


@pytest.fixture(params=[False, True], ids=["plain", "biased"])
def head(request: pytest.FixtureRequest) -> TopKExpertsHead:
    """A head whose last expert has 4 tokens less; router and tail are random."""
    dense = tiny_dense("phi", tied=False, bias=True) if request.param else tiny_dense()
    return tiny_converted(dense, num_always_on=8, num_experts=6, expert_size=16).head


# Hidden states


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_hidden_states_are_the_inputs_of_the_head(model_type: str, tmp_path: Path) -> None:
    dense, windows = tiny_dense(model_type), some_windows()
    head = dense.get_output_embeddings()
    entered: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0][0]))
    with torch.inference_mode():
        for window in windows:
            dense(torch.tensor([window.token_ids]))
    hook.remove()
    states = collect(dense, windows, HiddenStates.open(tmp_path, 32, dense.dtype))
    torch.testing.assert_close(states, torch.cat(entered))
    assert dense.get_output_embeddings() is head


def test_hidden_states_survive_on_disk(tmp_path: Path) -> None:
    dense, windows = tiny_dense(), some_windows()
    states = collect(dense, windows, HiddenStates.open(tmp_path, 32, dense.dtype)).clone()
    again = HiddenStates.open(tmp_path, 32, dense.dtype)
    assert (again.windows_done, again.positions) == (len(windows), len(states))
    assert torch.equal(again.load(), states)


def test_batches_hold_every_window_in_order() -> None:
    windows = some_windows()
    batches = list(batches_of(windows, positions=100))
    assert list(itertools.chain(*batches)) == windows
    assert all(len(batch) * len(batch[0].token_ids) <= 100 for batch in batches)
    assert [len(batch) for batch in batches_of(windows, positions=1)] == [1] * len(windows)


# The bundled sample


@pytest.mark.parametrize("chats", [False, True])
def test_models_with_a_chat_template_also_read_the_prompts(chats: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if chats else None
    texts, prompts = read_documents(str(TEXTS)), read_documents(str(PROMPTS))
    assert bundled_documents(tokenizer) == [*texts, *(prompts if chats else [])]
    windows, fingerprint = calibration_windows(tokenizer, Recipe(positions=9000, window_length=32))
    assert 8999 <= sum(len(window.token_ids) for window in windows) <= 9000
    documents = {window.document for window in windows}
    assert set(range(len(texts))) <= documents  # each has a window
    assert (max(documents) >= len(texts)) == chats
    assert fingerprint == calibration_windows(tokenizer, Recipe(positions=99))[1]
    tokenizer.chat_template = None if chats else CHAT_TEMPLATE
    assert fingerprint != calibration_windows(tokenizer, Recipe(positions=99))[1]


def test_a_user_s_text_replaces_the_bundled_texts(tmp_path: Path) -> None:
    recipe = Recipe(text=str(tiny_text(tmp_path / "text.jsonl")), positions=200, window_length=32)
    windows, _ = calibration_windows(tiny_tokenizer(), recipe)
    assert {window.document for window in windows} == {0, 1, 2, 3}
    assert sum(len(window.token_ids) for window in windows) == 200


def test_conversations_are_read_through_the_chat_template(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": turns, "source": "w9"})] * 3))
    recipe = Recipe(text=str(tmp_path / "chats.jsonl"), positions=200, window_length=32)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<pad> {{ message.content }} {% endfor %}"
    windows, _ = calibration_windows(tokenizer, recipe)
    assert [tokenizer.decode(window.token_ids) for window in windows] == ["<pad> w5 w6 <pad> w7"] * 3


# Distillation


def test_token_probabilities_are_the_mean_softmax(head: TopKExpertsHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(distillation, "LOGIT_BYTES_AT_ONCE", 4 * VOCAB_SIZE * 70)
    states = some_states()
    got = token_statistics(states, head.weight, head.bias).probabilities
    expected = F.linear(states, head.weight, head.bias).softmax(dim=-1).mean(dim=0)
    torch.testing.assert_close(got, expected.detach())
    assert float(got.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("rows_at_once", "states_at_once"), [(8192, 4096), (20, 7)])
def test_masses_are_the_log_sum_exp_of_each_expert(
    rows_at_once: int, states_at_once: int, head: TopKExpertsHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "ROWS_AT_ONCE", rows_at_once)
    monkeypatch.setattr(distillation, "STATES_AT_ONCE", states_at_once)
    states = some_states(50)
    got = expert_masses(states, head.weight, head.bias, groups_of(head))
    logits = F.linear(states, head.weight, head.bias)
    groups = [*(sorted(set(ids.tolist())) for ids in head.expert_ids), head.always_on_ids.tolist()]
    expected = torch.stack([logits[:, ids].logsumexp(dim=-1) for ids in groups], dim=-1)
    torch.testing.assert_close(got, expected.detach())


def test_groups_contain_every_token_once(head: TopKExpertsHead) -> None:
    assert torch.cat(groups_of(head)).sort().values.tolist() == list(range(VOCAB_SIZE))


@torch.no_grad()
def router_kl(head: TopKExpertsHead, states: Tensor, masses: Tensor) -> float:
    predicted = torch.cat([head.router(states), masses[:, head.num_experts :]], dim=-1)
    return float(F.kl_div(predicted.log_softmax(-1), masses.log_softmax(-1), log_target=True, reduction="batchmean"))


def masses_of(head: TopKExpertsHead, states: Tensor) -> Tensor:
    return expert_masses(states, head.weight, head.bias, groups_of(head))


def test_the_initial_router_is_a_ridge_regression_of_the_masses(
    head: TopKExpertsHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "STATES_AT_ONCE", 70)
    states = some_states() + 3  # which have a mean
    masses = masses_of(head, states)
    start_router(head.router, states, masses)
    centred, target = (one.double() - one.double().mean(dim=0) for one in (states, masses[:, :6]))
    gram = centred.t() @ centred
    ridge = distillation.RIDGE * gram.diagonal().mean() * torch.eye(32)
    rows = torch.linalg.solve(gram + ridge, centred.t() @ target).t()
    torch.testing.assert_close(head.router.rows.double(), rows, rtol=1e-3, atol=1e-3)
    # No expert is over- or underrated on the whole.
    scores = head.router(states).detach()
    torch.testing.assert_close(scores.mean(dim=0), masses[:, :6].mean(dim=0), rtol=1e-4, atol=1e-3)
    off = (scores - masses[:, :6]).square().mean()
    assert off < 0.5 * target.square().mean()  # that is: it tells more than the mean alone


@pytest.mark.parametrize("magnitude", [1e-3, 1e3])
def test_the_initial_router_does_not_depend_on_the_scale_of_the_states(magnitude: float, head: TopKExpertsHead) -> None:
    states = some_states()
    masses = masses_of(head, states)
    start_router(head.router, states, masses)
    expected = head.router(states).detach()
    start_router(head.router, states * magnitude, masses)
    torch.testing.assert_close(head.router(states * magnitude).detach(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("copies", [1, 30])
def test_the_initial_router_fits_the_masses_of_low_rank_states(copies: int) -> None:
    head, states = tiny_converted().head, some_states(10).repeat(copies, 1)
    masses = masses_of(head, states)
    start_router(head.router, states, masses)
    torch.testing.assert_close(head.router(states).detach(), masses[:, :6], rtol=0.02, atol=1.0)


@pytest.mark.parametrize("starts_well", [False, True])
@pytest.mark.parametrize("magnitude", [0.01, 1.0, 100.0])
def test_training_reduces_the_kl_divergence_of_the_router(starts_well: bool, magnitude: float) -> None:
    head = tiny_converted().head
    states = some_states() * magnitude
    head.weight.data.div_(magnitude)
    masses = masses_of(head, states)
    head.router.reset_parameters()
    if starts_well:
        start_router(head.router, states, masses)
    before = router_kl(head, states, masses)
    last = train_router(head.router, states, masses, 200, 64, 1e-2, 0)
    after = router_kl(head, states, masses)
    assert after < (0.98 if starts_well else 0.8) * before
    assert last == pytest.approx(after, rel=0.5)


def test_training_changes_only_the_rows_and_the_bias(head: TopKExpertsHead) -> None:
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    train_router(head.router, some_states(), masses_of(head, some_states()), 20, 64, 1e-2, 0)
    changed = {name for name, tensor in head.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"router.rows", "router.bias"}


# Tail and combiner


@pytest.mark.parametrize("power", [TEMPER, 1.0])
def test_the_prior_is_the_tempered_mean_probability_within_each_expert(
    power: float, head: TopKExpertsHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_topk.convert.steps.fit_packed_rows.TEMPER", power)
    probabilities = torch.rand(VOCAB_SIZE, generator=torch.Generator().manual_seed(6))
    probabilities[head.expert_ids[3, 5]] = 0  # never in the calibration text
    probabilities /= probabilities.sum()
    fit_tail(head, metric_of(some_states()), probabilities, [])
    for expert, ids in enumerate(head.expert_ids.tolist()):
        own = {token: max(float(probabilities[token]), 1e-12) ** power for token in ids}  # repeats add nothing
        expected = torch.tensor([own[token] / sum(own.values()) for token in ids])
        torch.testing.assert_close(head.tail.log_prior[expert].exp(), expected)
    assert head.tail.log_prior.isfinite().all()


def test_unused_ids_keep_their_share_of_an_expert(head: TopKExpertsHead) -> None:
    """The other tokens of the expert are tempered."""
    probabilities = torch.rand(VOCAB_SIZE, generator=torch.Generator().manual_seed(6)).pow(3)
    probabilities /= probabilities.sum()
    unused = [*head.expert_ids[2, :5].tolist(), *head.expert_ids[3].tolist()]
    fit_tail(head, metric_of(some_states()), probabilities, unused)
    for expert, ids in enumerate(head.expert_ids):
        own, is_unused = probabilities[ids], torch.isin(ids, torch.tensor(unused))
        tempered = own.sqrt() * ~is_unused
        expected = torch.where(is_unused, own, tempered / tempered.sum() * own[~is_unused].sum())
        repeats = torch.cat([torch.tensor([False]), ids[1:] == ids[0]])
        if not repeats.any():
            torch.testing.assert_close(head.tail.log_prior[expert].exp(), expected / own.sum())


def test_a_learned_combiner_does_not_add_divergence() -> None:
    head = tiny_converted(combine="learned").head
    states = some_states()
    start_router(head.router, states, masses_of(head, states))
    fit_tail(head, metric_of(states), token_statistics(states, head.weight, None).probabilities, [])

    @torch.no_grad()
    def divergence() -> float:
        dense, sparse = F.linear(states, head.weight), head.sparse_logits(states)
        return float(F.kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean"))

    before = divergence()
    fit_combiner(head, states, 0)
    assert divergence() < before


def test_exact_logits_have_no_combiner(head: TopKExpertsHead) -> None:
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    fit_combiner(head, some_states(), 0)
    assert all(tensor.equal(before[name]) for name, tensor in head.state_dict().items())


# The whole


def test_no_document_is_in_both_parts() -> None:
    windows = [Window(number // 3, (1, 2)) for number in range(30)]
    distil_on, held_out = split_by_document(windows, 0.2, 0)
    assert len({window.document for window in held_out}) == 2
    assert not {window.document for window in held_out} & {window.document for window in distil_on}
    assert sorted([*distil_on, *held_out], key=lambda window: window.document) == windows


@pytest.mark.parametrize("held_out", [0.001, 0.5, 0.999])
def test_neither_part_of_a_split_is_empty(held_out: float) -> None:
    for documents in (1, 2, 5):
        windows = [Window(number % documents, (1, 2)) for number in range(10)]
        distil_on, rest = split_by_document(windows, held_out, 0)
        assert 0 < len(distil_on) == 10 - len(rest) < 10
    with pytest.raises(InputError, match="only one window"):
        split_by_document([Window(0, (1, 2))], held_out, 0)


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
    few, many = (quick(num_experts_per_tok=3, num_rescored=16, **{name: rank}) for rank in (1, 32))
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
