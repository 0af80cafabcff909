"""What is observed while the heads are compared, beside what the model itself returns position by position."""

import dataclasses

import pytest
import torch
from support.tiny_models import some_windows, tiny_converted, tiny_dense

from hf_topk import TopKExpertsForCausalLM
from hf_topk.evaluation import observations
from hf_topk.evaluation.fidelity import Fidelity, measure_fidelity
from hf_topk.evaluation.observations import CALIBRATED_EVERY, CAUSES, Observations, Observer
from hf_topk.windows import NO_TOKEN

NUM_EXPERTS = 6


def observe(model: TopKExpertsForCausalLM) -> tuple[Fidelity, Observations]:
    observer = Observer(model.head)
    fidelity = measure_fidelity(model, some_windows(), observer)
    return fidelity, observer.observations("a text")


@torch.no_grad()
def states_of(model: TopKExpertsForCausalLM) -> torch.Tensor:
    """Hidden states of all windows, [N, d]."""
    rows = [model.base.base_model(torch.tensor([window.token_ids])).last_hidden_state[0] for window in some_windows()]
    return torch.cat(rows)


@torch.no_grad()
def logits_of(model: TopKExpertsForCausalLM, mode: str) -> list[torch.Tensor]:
    model.head_mode = mode
    return [model(torch.tensor([window.token_ids])).logits[0].float() for window in some_windows()]


def test_picks_are_counted() -> None:
    model = tiny_converted()
    fidelity, seen = observe(model)
    assert seen.positions == fidelity.positions
    expected = [0] * NUM_EXPERTS
    for state in states_of(model):
        for expert in model.head.router(state.unsqueeze(0))[0].topk(2).indices.tolist():
            expected[expert] += 1
    assert seen.picks == expected
    assert seen.share_of_busiest == max(expected) / sum(expected)


@pytest.mark.parametrize("bias", [False, True])
def test_the_calibration_is_that_of_every_seventh_position(bias: bool) -> None:
    model = tiny_converted(tiny_dense("phi", tied=False, bias=True) if bias else None)
    _, seen = observe(model)
    states, head = states_of(model)[::CALIBRATED_EVERY], model.head
    predicted = head.router(states).softmax(dim=-1).flatten()
    logits = head.dense_logits(states).detach()
    real = [list(dict.fromkeys(ids)) for ids in head.expert_ids.tolist()]
    dense = torch.stack([logits[:, ids].logsumexp(dim=-1) for ids in real], dim=-1).softmax(dim=-1).flatten()
    bins: dict[int, list[int]] = {}
    for pair, probability in enumerate(predicted.tolist()):
        place = next(number for number in range(11, -1, -1) if number == 0 or probability >= 10 ** (number / 2 - 6))
        bins.setdefault(place, []).append(pair)
    assert len(bins) > 2
    for one, (_, pairs) in zip(seen.calibration, sorted(bins.items()), strict=True):
        assert one.pairs == len(pairs)
        assert one.predicted == pytest.approx(float(predicted[pairs].mean()), rel=1e-4)
        assert one.dense == pytest.approx(float(dense[pairs].mean()), rel=1e-4)


@pytest.mark.parametrize("num_rescored", [5, 256])
def test_the_misses_are_where_the_heads_differ(num_rescored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observations, "MISSES_KEPT", 30)
    monkeypatch.setattr(observations, "TOKENS_BEFORE", 4)
    model = tiny_converted(num_rescored=num_rescored)
    fidelity, seen = observe(model)
    expected = {}
    for window, dense, sparse in zip(
        some_windows(), logits_of(model, "dense"), logits_of(model, "sparse"), strict=True
    ):
        for place, (p, q) in enumerate(zip(dense.softmax(-1), sparse.softmax(-1), strict=True)):
            if (best := int(p.argmax())) != (chosen := int(q.argmax())):
                follower = None if window.followers[place] == NO_TOKEN else window.followers[place]
                key = (*window.token_ids[: place + 1][-4:], follower, best, chosen)
                expected[key] = [float(p[best]), float(q[chosen]), float(p[chosen])]
    assert seen.missed == len(expected) == round((1 - fidelity.agreement) * fidelity.positions)
    assert len(seen.misses) == 30 < len(expected)
    for miss in seen.misses:
        found = [miss.dense_probability, miss.sparse_probability, miss.dense_probability_of_sparse]
        wanted = expected[(*miss.before, miss.follower, miss.dense, miss.sparse)]
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    losses = sorted((dense - of_sparse for dense, _, of_sparse in expected.values()), reverse=True)
    assert [miss.loss for miss in seen.misses] == pytest.approx(losses[:30], abs=1e-5)


def test_each_miss_has_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observations, "MISSES_KEPT", 1000)
    model = tiny_converted(num_rescored=5)
    _, seen = observe(model)
    head, found = model.head, set()
    contexts = [window.token_ids[: end + 1] for window in some_windows() for end in range(window.positions)]
    by_context = dict(zip(contexts, states_of(model), strict=True))
    for miss in seen.misses:
        scored = head.score(by_context[tuple(miss.before)].unsqueeze(0))
        exact = set(scored.ids[0].tolist())
        picked = {token for expert in scored.experts[0].tolist() for token in head.expert_ids[expert].tolist()}
        expected = "outscored" if miss.dense in exact else "screen" if miss.dense in picked else "router"
        assert miss.cause == expected
        found.add(miss.cause)
    assert {"screen", "router"} <= found <= set(CAUSES)


def test_all_experts_miss_nothing() -> None:
    _, seen = observe(tiny_converted(num_experts_per_tok=NUM_EXPERTS))
    assert (seen.missed, seen.misses) == (0, [])
    assert seen.picks == [seen.positions] * NUM_EXPERTS


def test_observations_are_kept_as_json() -> None:
    _, seen = observe(tiny_converted())
    assert Observations.from_json(seen.to_json()) == seen
    assert seen.without_text() == dataclasses.replace(seen, misses=[])
    assert seen.without_text().missed > 0
