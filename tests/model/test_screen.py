"""The screen: exact logits for the likeliest tokens of the picked experts, estimates for the rest."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.heads import CLOSE, dense_logits, make_head, make_hidden, picked_experts, seeds, sizes, unique_ids
from support.tiny_models import VOCAB_SIZE
from torch import Tensor

from hf_topk import TopKExpertsHead
from hf_topk.model import head
from hf_topk.model.token_chooser import likeliest


def estimates_of(head: TopKExpertsHead, hidden: Tensor, experts: list[int]) -> dict[int, float]:
    """The screen's estimates of the tokens of some experts, the likeliest first, of a hidden state [1, d]."""
    scores, estimates = head.router(hidden)[0], {}
    within = head.tail.screen(hidden, torch.arange(head.num_experts).expand(1, -1))[0]
    for expert in experts:
        ids = unique_ids(head, expert)
        places = [head.expert_ids[expert].tolist().index(token) for token in ids.tolist()]
        shares = within[expert, places].log_softmax(dim=0)
        estimates |= dict(zip(ids.tolist(), (scores[expert] + shares).tolist(), strict=True))
    return dict(sorted(estimates.items(), key=lambda one: one[1], reverse=True))


def expected_logits(head: TopKExpertsHead, hidden: Tensor) -> Tensor:
    """The logits, position by position and expert by expert."""
    dense, scores = dense_logits(head, hidden), head.router(hidden)
    expected = torch.full_like(dense, -torch.inf)
    for position, picked in enumerate(picked_experts(head, hidden)):
        for expert, ids in enumerate(head.expert_ids):
            expected[position, ids] = scores[position, expert] + head.tail.log_prior[expert]
        estimates = estimates_of(head, hidden[position : position + 1], picked)
        best = list(estimates)[: head.num_rescored]
        estimated = torch.tensor([estimates[token] for token in best]).logsumexp(dim=0)
        offset = dense[position, best].logsumexp(dim=0) - estimated
        expected[position, list(estimates)] = torch.tensor(list(estimates.values()))
        expected[position] += offset
        expected[position, best] = dense[position, best]
    expected[:, head.always_on_ids] = dense[:, head.always_on_ids]
    return expected


@settings(max_examples=50, deadline=None)
@given(seed=seeds, positions=st.integers(1, 4), bias=st.booleans(), choices=sizes(), num_rescored=st.integers(1, 40))
def test_logits_equal_the_worked_example(
    seed: int, positions: int, bias: bool, choices: dict[str, int], num_rescored: int
) -> None:
    head, hidden = make_head(bias=bias, num_rescored=num_rescored, **choices), make_hidden(seed, positions)
    assume(head.screens)
    torch.testing.assert_close(head.sparse_logits(hidden), expected_logits(head, hidden), **CLOSE[torch.float32])


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds,
    positions=st.integers(1, 4),
    choices=sizes(),
    num_rescored=st.integers(1, 60),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_invariants(
    seed: int, positions: int, choices: dict[str, int], num_rescored: int, bias: bool, dtype: torch.dtype
) -> None:
    """Rescored tokens have dense logits, the likeliest token is the sparse argmax, all experts are the dense head."""
    head = make_head(bias=bias, dtype=dtype, num_rescored=num_rescored, **choices)
    hidden = make_hidden(seed, positions, dtype)
    logits, dense = head.sparse_logits(hidden), dense_logits(head, hidden)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    scored = head.score(hidden)
    if head.screens:
        assert scored.ids.shape == (positions, head.num_always_on + num_rescored)
    torch.testing.assert_close(logits.gather(1, scored.ids), dense.gather(1, scored.ids), **CLOSE[dtype])
    chosen = logits.gather(1, likeliest(head, scored).unsqueeze(-1)).squeeze(-1)
    assert chosen.equal(logits.amax(dim=-1))  # in 16 bits two can be the best
    head.num_experts_per_tok = head.num_experts
    torch.testing.assert_close(head.sparse_logits(hidden), dense, **CLOSE[dtype])


@settings(max_examples=30, deadline=None)
@given(seed=seeds, choices=sizes(), num_rescored=st.integers(1, 60))
def test_the_likeliest_tokens_get_exact_logits_once_each(seed: int, choices: dict[str, int], num_rescored: int) -> None:
    """Also if the last expert is short: its repeated ids are not rescored."""
    head, hidden = make_head(num_rescored=num_rescored, **choices), make_hidden(seed, 1)
    assume(head.screens)
    estimates = estimates_of(head, hidden, picked_experts(head, hidden)[0])
    rescored = head.score(hidden).ids[0, head.num_always_on :].unique().tolist()
    assert len(rescored) == min(num_rescored, len(estimates))
    left = [estimate for token, estimate in estimates.items() if token not in rescored]
    assert min(estimates[token] for token in rescored) >= max(left, default=-torch.inf) - 1e-4


@settings(max_examples=60, deadline=None)
@given(seed=seeds, choices=sizes(), num_rescored=st.integers(1, 60), spread=st.sampled_from([0.01, 0.3, 3.0]))
def test_the_quick_test_never_says_more_than_the_bound(
    seed: int, choices: dict[str, int], num_rescored: int, spread: float
) -> None:
    head, hidden = make_head(num_rescored=num_rescored, **choices), make_hidden(seed, 1) * spread
    scored = head.score(hidden)
    if scored.has_the_likeliest():
        assert not head.tail_may_win(scored).any()


def test_the_quick_test_is_for_all_positions_and_unchanged_logits() -> None:
    head = make_head(num_always_on=4, num_experts_per_tok=5, num_rescored=6)  # no expert is short
    hidden = make_hidden(0, 200)
    sure = torch.tensor([head.score(one).has_the_likeliest() for one in hidden.split(1)])
    assert 0 < int(sure.sum()) < len(sure)
    assert head.score(hidden[sure]).has_the_likeliest()
    assert not head.score(hidden).has_the_likeliest()
    scored = head.score(hidden[sure][:1])
    assert not scored.with_exact(scored.exact - 100).has_the_likeliest()
    assert head.tail_may_win(scored.with_exact(scored.exact - 100)).all()


def test_rescoring_all_picked_tokens_needs_no_screen() -> None:
    few, many, hidden = make_head(num_rescored=2 * 16 - 1), make_head(num_rescored=2 * 16), make_hidden(0, 3)
    assert few.screens
    assert not many.screens
    assert many(hidden).equal(make_head(num_rescored=1000)(hidden))
    assert not many(hidden).equal(few(hidden))


@pytest.mark.parametrize("combine", ["router", "learned"])
def test_other_combines_need_all_exact_logits(combine: str) -> None:
    head, hidden = make_head(num_rescored=3, combine=combine), make_hidden(0, 3)
    assert not head.screens
    assert head(hidden).equal(make_head(combine=combine)(hidden))


def test_positions_do_not_depend_on_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any batching and chunking."""
    sparse, hidden = make_head(num_rescored=5, num_experts_per_tok=3), make_hidden(0, 12)
    together = sparse(hidden)
    for _ in range(2):
        one_by_one = torch.cat([sparse(one) for one in hidden.split(1)])
        torch.testing.assert_close(sparse(hidden), one_by_one, **CLOSE[torch.bfloat16])  # which few are rounded to
        torch.testing.assert_close(sparse(hidden), together, **CLOSE[torch.float32])
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", 5 * sparse.out_features)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, bias=st.booleans(), num_always_on=st.sampled_from([0, 4, 20]), num_rescored=st.integers(1, 20))
def test_one_position_is_scored_as_several_are(seed: int, bias: bool, num_always_on: int, num_rescored: int) -> None:
    """A single position has steps of its own, if no expert is short and the router is packed."""
    layout = {"expert_size": 8, "num_experts": -(-(VOCAB_SIZE - num_always_on) // 8), "num_always_on": num_always_on}
    sparse = make_head(bias=bias, router_packed=True, num_experts_per_tok=3, num_rescored=num_rescored, **layout)
    assert sparse.screens
    assert sparse.has_short_experts == (num_always_on == 0)
    hidden = make_hidden(seed, 3)
    together, alone = sparse.score(hidden), sparse.score(hidden[:1])
    for name in ("scores", "masses", "screened", "offset"):
        few = CLOSE[torch.bfloat16]
        torch.testing.assert_close(getattr(alone, name), getattr(together.part(slice(1)), name), **few)
    exact = dict(zip(alone.ids[0].tolist(), alone.exact[0].tolist(), strict=True))
    dense = dense_logits(sparse, hidden)[0]
    assert exact == pytest.approx({token: float(dense[token]) for token in exact}, abs=1e-4)
    routed = alone.screened.flatten()[alone.places[0]] + alone.masses[0, alone.places[0] // 8]
    torch.testing.assert_close(routed, alone.kept[0])


def test_masses_of_the_picked_experts_and_of_the_others() -> None:
    head, hidden = make_head(num_rescored=5, num_experts_per_tok=3), make_hidden(1, 6)
    logits, scored = head.sparse_logits(hidden), head.score(hidden)
    picked = torch.zeros_like(logits, dtype=torch.bool)
    picked[:, head.always_on_ids] = True
    for position, experts in enumerate(picked_experts(head, hidden)):
        picked[position, head.expert_ids[experts].flatten()] = True
    for mass, is_part in ((head.mass_outside(scored), ~picked), (head.mass_inside(scored), picked)):
        expected = logits.masked_fill(~is_part, -torch.inf).logsumexp(dim=-1)
        torch.testing.assert_close(mass, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router_packed", [False, True])
def test_compiles_to_one_graph(router_packed: bool) -> None:
    head, hidden = make_head(num_rescored=5, router_packed=router_packed), make_hidden(2, 2)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden), head(hidden), **CLOSE[torch.bfloat16])  # which eager code rounds to


def test_gradients_reach_the_hidden_states() -> None:
    """Through exact logits, router and screen."""
    head, hidden = make_head(num_rescored=5, router_packed=True), make_hidden(3, 2).requires_grad_()
    logits, ids = head.sparse_logits(hidden), head.score(hidden.detach()).ids
    gradient = torch.autograd.grad(logits.gather(1, ids).sum(), hidden, retain_graph=True)[0]
    expected = torch.stack([head.weight[row].sum(dim=0) for row in ids])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    of_all = torch.autograd.grad(logits.logsumexp(dim=-1).sum(), hidden)[0]
    assert of_all.isfinite().all()
    assert of_all.any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("router_packed", [False, True])
def test_bytes_read(bias: bool, router_packed: bool) -> None:
    head = make_head(num_rescored=5, bias=bias, router_packed=router_packed)
    # Rank 4 takes one byte for the two directions of 4 bits, and one for four of 2 bits.
    basis = 6 * 32 + 4 * (6 + 6)
    router = basis + 6 * 2 + 4 * (32 + 6) + (not router_packed) * 4 * 6 * 32
    screen, prior = basis + 2 * 16 * (2 + 4), 4 * 6 * 16
    assert head.bytes_read() == (8 + 5) * 4 * (32 + bias) + router + screen + prior
    head.num_rescored = 7
    head.num_experts_per_tok = 3
    assert head.bytes_read() == (8 + 7) * 4 * (32 + bias) + router + screen + 16 * (2 + 4) + prior
