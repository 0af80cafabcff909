"""The steps of a conversion in memory, each beside the plainest way to compute the same."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CHAT_TEMPLATE, QUICK, VOCAB_SIZE, tiny_converted, tiny_dense, tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_topk.convert import Recipe, Report, convert
from hf_topk.convert import distill as distillation
from hf_topk.convert.calibrate import split_by_document
from hf_topk.convert.dense_head import head_of
from hf_topk.convert.distill import expert_masses, groups_of, start_router, token_statistics, train_router
from hf_topk.convert.fit_tail import fit_combiner, fit_tail
from hf_topk.convert.hidden_states import HiddenStates, batches_of, collect
from hf_topk.convert.mixed_sample import TEXTS, mixed_sample, own_answers
from hf_topk.documents import read_documents
from hf_topk.errors import InputError
from hf_topk.head import TopKExpertsHead
from hf_topk.measure.fidelity import measure_fidelity
from hf_topk.text import Window


def some_windows(documents: int = 12, length: int = 40) -> list[Window]:
    """Windows of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = range(length, length - documents, -1)
    return [
        Window(number, tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()))
        for number, length in enumerate(lengths)
    ]


def some_states(count: int = 300) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(4))


def quick(dense: PreTrainedModel | None = None, **choices: Any) -> Report:
    return convert(dense or tiny_dense(), tiny_tokenizer(), Recipe(**{**QUICK, **choices}), windows=some_windows())


@pytest.fixture(params=[False, True], ids=["plain", "biased"])
def head(request: pytest.FixtureRequest) -> TopKExpertsHead:
    """A head whose last expert is 4 ids short; router and tail are not set."""
    dense = tiny_dense("phi", tied=False, bias=True) if request.param else tiny_dense()
    return tiny_converted(dense, router_type="low_rank", num_always_on=8, num_experts=6, expert_size=16).head


def short_head(kind: str) -> TopKExpertsHead:
    return tiny_converted(router_type=kind).head


# Hidden states


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_hidden_states_are_what_enters_the_head(model_type: str, tmp_path: Path) -> None:
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


# The mixed sample

PROMPTS = [[2 + number, 50, 3 + number] for number in range(60)]


def test_every_other_batch_of_answers_is_greedy(tmp_path: Path) -> None:
    dense = tiny_dense(tied=False)
    before = torch.get_rng_state()
    answers = own_answers(dense, PROMPTS[:40], 2 * 40 * 20, 20, 0, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert [answer[:3] for answer in answers] == [*PROMPTS[:32] * 2, *PROMPTS[32:40] * 2]
    assert max(map(len, answers)) <= 20
    assert not any(0 in answer[3:] for answer in answers)  # the token that ends a text
    greedy = answers[5]
    expected = dense.generate(torch.tensor([PROMPTS[5]]), max_new_tokens=17, do_sample=False)[0].tolist()
    assert greedy == expected[: len(greedy)]
    assert sum(one != other for one, other in zip(answers[:32], answers[32:64], strict=True)) > 24


def test_answers_follow_the_model_not_its_generation_config(tmp_path: Path) -> None:
    dense = tiny_dense(tied=False)
    plain = own_answers(dense, PROMPTS, 1500, 20, 0, tmp_path / "plain")
    assert sum(map(len, plain)) == 1500
    dense.generation_config.update(do_sample=True, temperature=0.01, top_k=1, repetition_penalty=9.0, num_beams=3)
    assert own_answers(dense, PROMPTS, 1500, 20, 0, tmp_path / "changed") == plain


def test_answers_have_the_model_s_own_distribution(tmp_path: Path) -> None:
    dense = tiny_dense(tied=False)
    dense.generation_config.eos_token_id = None
    answers = own_answers(dense, [[5]] * 6000, 24_000, 2, 0, tmp_path)
    drawn = torch.bincount(
        torch.tensor([answer[1] for batch in range(1, 375, 2) for answer in answers[32 * batch : 32 * batch + 32]]),
        minlength=VOCAB_SIZE,
    )
    probabilities = dense(torch.tensor([[5]])).logits[0, -1].detach().softmax(dim=-1)
    assert float((drawn / drawn.sum() - probabilities).abs().sum()) < 0.1


@pytest.mark.parametrize("chats", [False, True])
def test_chat_models_learn_from_their_answers_too(chats: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if chats else None
    recipe = Recipe(positions=4000, window_length=64)
    windows = mixed_sample(tiny_dense(), tokenizer, recipe, tmp_path)
    assert sum(len(window.token_ids) for window in windows) == 4000
    documents = [window.document for window in windows]
    assert documents == sorted(documents)
    texts = len(read_documents(str(TEXTS)))
    own = sum(len(window.token_ids) for window in windows if window.document >= texts)
    assert own == (2000 if chats else 0)


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
    torch.testing.assert_close(got.log_sums, expected.detach())
    likeliest = logits.argmax(dim=-1).tolist()
    assert all(token in groups[group] for token, group in zip(likeliest, got.best.tolist(), strict=True))


def test_groups_hold_every_token_once(head: TopKExpertsHead) -> None:
    assert torch.cat(groups_of(head)).sort().values.tolist() == list(range(VOCAB_SIZE))


@pytest.mark.parametrize("kind", ["centroid", "linear", "low_rank", "mlp"])
def test_routers_start_at_the_mean_rows(kind: str) -> None:
    head = short_head(kind)
    start_router(head)
    for expert, ids in enumerate(groups_of(head)[: head.num_experts]):
        torch.testing.assert_close(head.router.mean_rows[expert], head.weight[ids].mean(dim=0))
        assert float(head.router.bias[expert].detach().exp()) == pytest.approx(len(ids))  # rows that were all the mean


def test_an_attention_router_starts_at_means_of_groups() -> None:
    """Each key is the mean of the rows nearest to it, so that together they lie nearer to the rows than one mean."""
    head = short_head("attention")
    start_router(head)
    for expert, ids in enumerate(groups_of(head)[: head.num_experts]):
        rows, keys = head.weight[ids], head.router.keys[expert]
        nearest = torch.cdist(rows, keys).argmin(dim=-1)
        for key in nearest.unique():
            torch.testing.assert_close(keys[key], rows[nearest == key].mean(dim=0))
        to_keys = torch.cdist(rows, keys).amin(dim=-1).square().sum()
        assert to_keys < (rows - rows.mean(dim=0)).square().sum()
        sizes = torch.bincount(nearest, minlength=len(keys)).float()
        torch.testing.assert_close(head.router.bias[expert].exp(), sizes, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def router_kl(head: TopKExpertsHead, states: Tensor, masses: Tensor) -> float:
    predicted = torch.cat([head.router(states), masses[:, head.num_experts :]], dim=-1)
    return float(F.kl_div(predicted.log_softmax(-1), masses.log_softmax(-1), log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("kind", ["linear", "low_rank", "mlp", "attention"])
@pytest.mark.parametrize("magnitude", [0.01, 1.0, 100.0])
def test_training_brings_the_router_nearer_to_the_dense_head(kind: str, magnitude: float) -> None:
    torch.manual_seed(0)
    head = tiny_converted(router_type=kind, router_rank=8).head
    states = some_states() * magnitude
    head.weight.data.div_(magnitude)
    start_router(head)
    masses = expert_masses(states, head.weight, head.bias, groups_of(head)).log_sums
    before = router_kl(head, states, masses)
    last = train_router(head.router, states, masses, 200, 64, 1e-2, 0)
    after = router_kl(head, states, masses)
    assert after < 0.8 * before
    assert last == pytest.approx(after, rel=0.5)


@pytest.mark.parametrize(("kind", "learned"), [("centroid", set()), ("low_rank", {"down", "up", "bias"})])
def test_training_leaves_the_mean_rows(kind: str, learned: set[str]) -> None:
    head = short_head(kind)
    start_router(head)
    before = {name: tensor.clone() for name, tensor in head.router.state_dict().items()}
    masses = expert_masses(some_states(), head.weight, head.bias, groups_of(head)).log_sums
    loss = train_router(head.router, some_states(), masses, 20, 64, 1e-2, 0)
    after = head.router.state_dict()
    assert {name for name in before if not torch.allclose(after[name], before[name])} == learned
    assert (loss > 0) == bool(learned)


# Tail and combiner


def within_experts(head: TopKExpertsHead, states: Tensor) -> Tensor:
    """The dense log-probabilities within each expert, [N, M, S]."""
    return F.linear(states, head.weight, head.bias)[:, head.expert_ids].log_softmax(dim=-1).detach()


def test_a_tail_of_full_rank_gives_the_dense_probabilities_within_experts() -> None:
    full = tiny_converted(tail="low_rank", tail_rank=32, num_experts=6, num_always_on=4).head
    full.weight.data.mul_(0.2)
    states = some_states()
    fit_tail(full, states, torch.full((VOCAB_SIZE,), 1 / VOCAB_SIZE))
    got = full.tail(states).log_softmax(dim=-1)
    assert float((got - within_experts(full, states)).abs().mean()) < 0.1


@pytest.mark.parametrize("rank", [4, 16])
def test_a_low_rank_tail_follows_the_dense_logits(rank: int) -> None:
    model = tiny_converted(tail="low_rank", tail_rank=rank)
    # States and rows of few directions, with noise, as those of real models are.
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(4, 32, generator=generator)
    states = torch.randn(300, 4, generator=generator) @ directions + 0.1 * some_states()
    fit_tail(model.head, states, torch.full((VOCAB_SIZE,), 1 / VOCAB_SIZE))
    expected, got = within_experts(model.head, states), model.head.tail(states).log_softmax(dim=-1)
    assert float(torch.corrcoef(torch.stack([expected.flatten(), got.flatten()]))[0, 1]) > 0.97


def test_a_prior_tail_is_the_log_of_the_mean_probability() -> None:
    head = tiny_converted(tail="prior").head
    probabilities = torch.rand(VOCAB_SIZE, generator=torch.Generator().manual_seed(6))
    probabilities[5] = 0  # what the sample never shows
    fit_tail(head, some_states(), probabilities / probabilities.sum())
    within = (probabilities / probabilities.sum()).clamp_min(1e-12)[head.expert_ids]
    repeats = (head.expert_ids == head.expert_ids[:, :1]) & (torch.arange(head.expert_size) > 0)
    expected = within / within.masked_fill(repeats, 0).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(head.tail.log_prior, expected.log())
    assert head.tail.log_prior.isfinite().all()


@pytest.mark.parametrize("tail", ["low_rank", "prior"])
def test_a_learned_combiner_does_not_add_divergence(tail: str) -> None:
    model = tiny_converted(combine="learned", tail=tail)
    states = some_states()
    probabilities = token_statistics(states, model.head.weight, None).probabilities
    start_router(model.head)
    fit_tail(model.head, states, probabilities)

    @torch.no_grad()
    def divergence() -> float:
        dense, sparse = F.linear(states, model.head.weight), model.head.sparse_logits(states)
        return float(F.kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean"))

    before = divergence()
    fit_combiner(model.head, states, 0)
    assert divergence() < before


# The whole


def test_no_document_is_on_both_sides() -> None:
    windows = [Window(number // 3, (1, 2)) for number in range(30)]
    distil_on, held_out = split_by_document(windows, 0.2, 0)
    assert len({window.document for window in held_out}) == 2
    assert not {window.document for window in held_out} & {window.document for window in distil_on}
    assert sorted([*distil_on, *held_out], key=lambda window: window.document) == windows


@pytest.mark.parametrize("held_out", [0.001, 0.5, 0.999])
def test_both_sides_hold_something(held_out: float) -> None:
    for documents in (1, 2, 5):
        windows = [Window(number % documents, (1, 2)) for number in range(10)]
        distil_on, rest = split_by_document(windows, held_out, 0)
        assert 0 < len(distil_on) == 10 - len(rest) < 10
    with pytest.raises(InputError, match="a single window"):
        split_by_document([Window(0, (1, 2))], held_out, 0)


@pytest.mark.parametrize("combine", ["exact", "router", "learned"])
@pytest.mark.parametrize("tail", ["low_rank", "prior", "none"])
@pytest.mark.parametrize("router", ["centroid", "linear", "low_rank", "mlp", "attention"])
def test_every_combination_converts_and_evaluates(router: str, tail: str, combine: str) -> None:
    report = quick(router=router, tail=tail, combine=combine, num_experts_per_tok=3, num_always_on=9)
    figures = report.figures()
    assert 0.2 < figures["agreement"] <= figures["top5_containment"] <= 1
    assert figures["num_experts"] == report.model.head.num_experts == 6
    assert report.model.head.num_always_on == 9
    logits = report.model.head.sparse_logits(some_states())
    assert not logits.isnan().any()
    assert bool(logits.isfinite().all()) == (tail != "none")
    assert (figures["kl"] < 5) if tail != "none" else figures["kl"] == float("inf")


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
    dense = tiny_dense()
    for router in ("low_rank", "mlp", "attention"):
        models = []
        for seed in (0, 0, 1):
            torch.manual_seed(len(models))  # what went before does not matter
            models.append(quick(dense=dense, router=router, seed=seed).model.head.state_dict())
        assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
        assert not all(torch.equal(tensor, models[2][name]) for name, tensor in models[0].items())


def test_windows_are_cut_to_what_the_model_reads() -> None:
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


def test_refuses_a_model_that_is_converted() -> None:
    with pytest.raises(InputError, match="already converted"):
        head_of(tiny_converted())
    with pytest.raises(InputError, match="already converted"):
        convert(tiny_converted(), None, Recipe(**QUICK), windows=some_windows())


def test_distilling_beats_the_untrained_router() -> None:
    kls = [quick(router=kind, distill_steps=300, num_experts_per_tok=2).fidelity.kl for kind in ("centroid", "mlp")]
    assert kls[1] < kls[0]


def test_figures_are_those_of_the_model() -> None:
    report = quick(num_experts_per_tok=2)
    _, held_out = split_by_document(some_windows(), report.recipe.held_out, report.recipe.seed)
    assert measure_fidelity(report.model, held_out) == report.fidelity
    assert report.added_bytes == report.model.head.added_bytes()
