"""Router, tail and combiner are fitted to the dense head; against plain references."""

import pytest
import torch
from support.tiny_models import (
    VOCAB_SIZE,
    tiny_converted,
    tiny_dense,
)
from torch import Tensor
from torch.nn import functional as F

from hf_topk.convert.steps import distill as distillation
from hf_topk.convert.steps.distill import expert_masses, groups_of, start_router, token_statistics, train_router
from hf_topk.convert.steps.fit_combiner import fit_combiner
from hf_topk.convert.steps.pack_router_and_tail import TEMPER, fit_tail, metric_of
from hf_topk.model.head import TopKExpertsHead


def some_states(count: int = 300) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture(params=[False, True], ids=["plain", "biased"])
def head(request: pytest.FixtureRequest) -> TopKExpertsHead:
    """A head whose last expert has 4 tokens less; router and tail are random."""
    dense = tiny_dense("phi", tied=False, bias=True) if request.param else tiny_dense()
    return tiny_converted(dense, num_always_on=8, num_experts=6, expert_size=16).head


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
    monkeypatch.setattr("hf_topk.convert.steps.pack_router_and_tail.TEMPER", power)
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
