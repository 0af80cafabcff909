"""The head: logits with all experts, of scored tokens and of the tail, and bytes read."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import (
    CLOSE,
    COMBINES,
    dense_logits,
    make_head,
    make_hidden,
    picked_experts,
    scored_mask,
    seeds,
    sizes,
    unique_ids,
)
from support.tiny_models import VOCAB_SIZE
from torch import Tensor, nn

from hf_topk import TopKExpertsHead
from hf_topk.model import head, kernels
from hf_topk.model.candidates import Candidates
from hf_topk.model.suppression import Priors
from hf_topk.model.token_chooser import likeliest


def exact_mass(head: TopKExpertsHead, logits: Tensor, experts: list[int]) -> Tensor:
    """Log-sum-exp of a position's logits over the tokens of some experts."""
    return logits.double()[torch.cat([unique_ids(head, expert) for expert in experts])].logsumexp(-1)


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    positions=st.sampled_from([1, 2, 7]),
    gathers=st.booleans(),
    seed=seeds,
)
def test_all_experts_give_the_dense_logits(
    sizes: dict[str, int], bias: bool, dtype: torch.dtype, positions: int, gathers: bool, seed: int
) -> None:
    sizes["num_experts_per_tok"] = sizes["num_experts"]
    head, hidden = make_head(bias=bias, dtype=dtype, **sizes), make_hidden(seed, positions, dtype)
    with pytest.MonkeyPatch.context() as patch:
        if gathers:
            patch.setattr(kernels, "SHARE_WORTH_ALL_ROWS", math.inf)
        logits = head(hidden)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, dense_logits(head, hidden), **CLOSE[dtype])


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    positions=st.sampled_from([1, 5]),
    seed=seeds,
)
def test_scored_tokens_have_their_dense_logits(
    sizes: dict[str, int], bias: bool, dtype: torch.dtype, positions: int, seed: int
) -> None:
    head, hidden = make_head(bias=bias, dtype=dtype, **sizes), make_hidden(seed, positions, dtype)
    logits, dense, scored = head(hidden), dense_logits(head, hidden), scored_mask(head, hidden)
    torch.testing.assert_close(logits[scored], dense[scored], **CLOSE[dtype])
    assert logits.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes(),
    bias=st.booleans(),
    positions=st.integers(1, 3),
    seed=seeds,
)
def test_unscored_expert_has_the_mass_of_its_aligned_score(
    sizes: dict[str, int], bias: bool, positions: int, seed: int
) -> None:
    head, hidden = make_head(bias=bias, **sizes), make_hidden(seed, positions)
    logits, dense, scores = head(hidden), dense_logits(head, hidden), head.router(hidden).double()
    for position, picked in enumerate(picked_experts(head, hidden)):
        offset = exact_mass(head, dense[position], picked) - scores[position, picked].logsumexp(-1)
        for expert in set(range(head.num_experts)) - set(picked):
            mass = exact_mass(head, logits[position], [expert])
            torch.testing.assert_close(mass, scores[position, expert] + offset, rtol=1e-5, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes(), bias=st.booleans(), positions=st.integers(1, 3), seed=seeds)
def test_router_combine_gives_every_expert_its_score(
    sizes: dict[str, int], bias: bool, positions: int, seed: int
) -> None:
    head, hidden = make_head(bias=bias, combine="router", **sizes), make_hidden(seed, positions)
    logits, dense, scores = head(hidden), dense_logits(head, hidden), head.router(hidden)
    always = head.always_on_ids
    torch.testing.assert_close(logits[:, always], dense[:, always], **CLOSE[torch.float32])
    for position, picked in enumerate(picked_experts(head, hidden)):
        for expert in range(head.num_experts):
            mass = exact_mass(head, logits[position], [expert])
            torch.testing.assert_close(mass, scores[position, expert].double(), rtol=1e-5, atol=1e-3)
        for expert in picked:  # within an expert the dense head's own proportions
            ids = unique_ids(head, expert)
            within, expected = logits[position, ids].log_softmax(-1), dense[position, ids].log_softmax(-1)
            torch.testing.assert_close(within, expected, **CLOSE[torch.float32])


@settings(max_examples=30, deadline=None)
@given(sizes=sizes(), positions=st.integers(1, 3), seed=seeds)
def test_fresh_combiner_changes_nothing(sizes: dict[str, int], positions: int, seed: int) -> None:
    exact, learned = (make_head(combine=combine, **sizes) for combine in ("exact", "learned"))
    hidden = make_hidden(seed, positions)
    torch.testing.assert_close(learned(hidden), exact(hidden), **CLOSE[torch.float32])


def test_combiner_shifts_and_gates() -> None:
    exact, learned = (make_head(combine=combine) for combine in ("exact", "learned"))
    hidden = make_hidden(0, 3)
    scored, always = scored_mask(exact, hidden), torch.zeros(3, VOCAB_SIZE, dtype=torch.bool)
    always[:, exact.always_on_ids] = True
    learned.combiner.shift.fill_(2)
    learned.combiner.tail_shift.fill_(3)
    added = torch.where(always, 0.0, torch.where(scored, 2.0, 3.0))
    torch.testing.assert_close(learned(hidden), exact(hidden) + added, **CLOSE[torch.float32])
    learned.combiner.shift.zero_()
    learned.combiner.gate.fill_(1)  # all the way to the router's estimate, aligned with what was computed
    logits, dense, scores = learned(hidden), dense_logits(exact, hidden), exact.router(hidden).double()
    for position, picked in enumerate(picked_experts(exact, hidden)):
        offset = exact_mass(exact, dense[position], picked) - scores[position, picked].logsumexp(-1)
        for expert in picked:
            mass = exact_mass(exact, logits[position], [expert])
            torch.testing.assert_close(mass, scores[position, expert] + offset, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("combine", COMBINES)
def test_positions_do_not_depend_on_one_another(combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any batching, shape and chunking."""
    sparse, hidden = make_head(combine=combine), make_hidden(0, 12)
    together = sparse(hidden)
    one_by_one = torch.cat([sparse(one) for one in hidden.split(1)])
    torch.testing.assert_close(together, one_by_one, **CLOSE[torch.float32])
    torch.testing.assert_close(sparse(hidden.view(3, 4, 32)), together.view(3, 4, VOCAB_SIZE))
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 5 * VOCAB_SIZE)
    torch.testing.assert_close(sparse(hidden), together, **CLOSE[torch.float32])


@pytest.mark.parametrize("combine", COMBINES)
def test_runs_under_autocast(combine: str) -> None:
    head, hidden = make_head(combine=combine), make_hidden(0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits, dense = head(hidden), dense_logits(head, hidden)
    assert logits.dtype == dense.dtype == torch.bfloat16
    assert logits.isfinite().all()
    always = head.always_on_ids
    torch.testing.assert_close(logits[:, always], dense[:, always], **CLOSE[torch.bfloat16])


# Modes


@torch.no_grad()
def test_auto_is_sparse_up_to_sparse_max_positions() -> None:
    head = make_head(head_mode="auto", sparse_max_positions=4)
    hidden = make_hidden(0, 5)
    assert head(hidden).equal(dense_logits(head, hidden))
    assert head(hidden[:4]).equal(head.sparse_logits(hidden[:4]))
    assert head(hidden[:4].view(2, 2, 32)).equal(head.sparse_logits(hidden[:4]).view(2, 2, VOCAB_SIZE))
    assert not head(hidden[:4]).equal(dense_logits(head, hidden[:4]))
    assert [head.runs_sparse(positions) for positions in (1, 4, 5)] == [True, True, False]


def test_auto_is_dense_while_gradients_are_on() -> None:
    head, hidden = make_head(head_mode="auto"), make_hidden(0, 2)
    assert torch.is_grad_enabled()
    assert head(hidden).equal(dense_logits(head, hidden))
    with torch.inference_mode():
        assert head(hidden).equal(head.sparse_logits(hidden))


@pytest.mark.parametrize("positions", [1, 40])
def test_dense_and_sparse_do_not_depend_on_the_number_of_positions(positions: int) -> None:
    head, hidden = make_head(head_mode="dense"), make_hidden(0, positions)
    with torch.no_grad():
        assert head(hidden).equal(dense_logits(head, hidden))
    head.head_mode = "sparse"
    assert head(hidden).equal(head.sparse_logits(hidden))
    assert not head(hidden).equal(dense_logits(head, hidden))


# What is read


# Of router and tail each: the basis of 6 directions in int8, since rank 4 takes 2 bytes and fills them with 6.
BASIS = 6 * 32 + 4 * (6 + 6)


@pytest.mark.parametrize(
    ("router_packed", "router_bytes"),
    [(True, BASIS + 6 * 2 + 4 * (32 + 6)), (False, BASIS + 6 * 2 + 4 * (32 + 6) + 4 * 6 * 32)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_read(router_packed: bool, router_bytes: int, bias: bool) -> None:
    """Rows of the screen are not read if all tokens of the picked experts are rescored."""
    head = make_head(bias=bias, router_packed=router_packed)
    row, prior, screen = 4 * (32 + bias), 4 * 6 * 16, 6 * 16 * (2 + 4)
    assert head.bytes_read() == (8 + 2 * 16) * row + router_bytes + BASIS + prior
    assert head.dense_bytes() == 100 * row
    assert head.added_bytes() == router_bytes + BASIS + prior + screen + 8 * (8 + 6 * 16)
    head.num_experts_per_tok = 3
    assert head.bytes_read() == (8 + 3 * 16) * row + router_bytes + BASIS + prior


def test_bytes_read_in_half_the_bytes() -> None:
    """Bytes are those of the stored dtype."""
    head = make_head(router_packed=True)
    whole = head.bytes_read(), head.dense_bytes()
    integers = 2 * 6 * 32 + 6 * 2
    narrow = copy.deepcopy(head).to(torch.bfloat16)
    head.stored_type = torch.bfloat16
    for one in (head, narrow):
        assert one.bytes_read() == (whole[0] - integers) / 2 + integers
        assert one.dense_bytes() == whole[1] / 2 == 2 * 100 * 32


# Resizing


def resized(head: TopKExpertsHead, vocab_size: int) -> nn.Linear:
    layer = nn.Linear(32, vocab_size, bias=head.bias is not None)
    kept = min(vocab_size, VOCAB_SIZE)
    with torch.no_grad():
        layer.weight[:kept] = head.weight[:kept]
    return layer.requires_grad_(False)


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes(),
    bias=st.booleans(),
    vocab_size=st.integers(60, 140),
    positions=st.sampled_from([1, 4]),
    seed=seeds,
)
def test_take_over_of_a_resized_head(
    sizes: dict[str, int], bias: bool, vocab_size: int, positions: int, seed: int
) -> None:
    head, hidden = copy.deepcopy(make_head(bias=bias, **sizes)), make_hidden(seed, positions)
    before = head.always_on_ids.tolist()
    layer = resized(head, vocab_size)
    head.take_over(layer)
    assert head.weight is layer.weight
    assert head.bias is layer.bias
    assert head.always_on_ids.tolist() == [i for i in before if i < vocab_size] + list(range(VOCAB_SIZE, vocab_size))
    # Every id is still there to be scored, and none that is gone.
    assert set(head.always_on_ids.tolist()) | set(head.expert_ids.flatten().tolist()) == set(range(vocab_size))
    logits, dense, scored = head(hidden), layer(hidden), scored_mask(head, hidden)
    assert logits.shape == (positions, vocab_size)
    torch.testing.assert_close(logits[scored], dense[scored], **CLOSE[torch.float32])
    assert logits.isfinite().all()
    head.num_experts_per_tok = head.num_experts
    torch.testing.assert_close(head(hidden), dense, **CLOSE[torch.float32])


def screen_of_tokens(head: TopKExpertsHead, hidden: Tensor) -> dict[int, list[float]]:
    """The screen's logits of all routed tokens, not normalised."""
    screened = head.tail.screen(hidden, torch.arange(head.num_experts).expand(len(hidden), -1)).flatten(1)
    return dict(zip(head.expert_ids.flatten().tolist(), screened.t().tolist(), strict=True))


@pytest.mark.parametrize("vocab_size", [70, 99])
def test_shrinking_keeps_the_tail_of_the_remaining_tokens(vocab_size: int) -> None:
    head, hidden = make_head(), make_hidden(0, 3)
    before, screened = head(hidden)[:, :vocab_size].log_softmax(-1), screen_of_tokens(head, hidden)
    picked, scored = picked_experts(head, hidden), scored_mask(head, hidden)[:, :vocab_size]
    layer = resized(head, vocab_size)
    head.take_over(layer)
    after = head(hidden).log_softmax(-1)
    found = screen_of_tokens(head, hidden)
    assert found.keys() == {token for token in screened if token < vocab_size}
    assert all(found[token] == pytest.approx(screened[token], abs=1e-4) for token in found)
    for position in range(3):
        for expert in set(range(head.num_experts)) - set(picked[position]):
            ids = unique_ids(head, expert)
            assert not scored[position, ids].any()
            within, expected = after[position, ids].log_softmax(-1), before[position, ids].log_softmax(-1)
            torch.testing.assert_close(within, expected, rtol=1e-5, atol=1e-3)


# What only the argmax of matters


@settings(max_examples=100, deadline=None)
@given(
    sizes=sizes(),
    combine=st.sampled_from(COMBINES),
    spread=st.sampled_from([0.01, 0.3, 3.0]),
    positions=st.sampled_from([1, 4]),
    seed=seeds,
)
def test_the_likeliest_token_is_that_of_the_sparse_logits(
    sizes: dict[str, int], combine: str, spread: float, positions: int, seed: int
) -> None:
    head, hidden = make_head(combine=combine, **sizes), make_hidden(seed, positions) * spread
    assert likeliest(head, head.score(hidden)).equal(head.sparse_logits(hidden).argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("all_candidates", [True, False])
def test_of_equal_logits_the_lowest_id_wins_as_in_the_dense_head(dtype: torch.dtype, all_candidates: bool) -> None:
    """Rows and states of small whole numbers make many logits equal in any dtype."""
    head, hidden = copy.deepcopy(make_head(dtype=dtype)), make_hidden(1, 300, dtype).round()
    head.weight.copy_(torch.randint(-1, 2, head.weight.shape, generator=torch.Generator().manual_seed(0)))
    logits, scored = head.sparse_logits(hidden), head.score(hidden)
    chosen = Candidates(head, scored, Priors(head)).best() if all_candidates else likeliest(head, scored)
    assert ((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).float().mean() > 0.1
    assert chosen.equal(logits.argmax(-1))
    assert torch.cat([head.best_scored(one) for one in map(head.score, hidden.split(1))]).equal(
        head.best_scored(scored)
    )


def test_the_tail_is_computed_only_where_it_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden = copy.deepcopy(make_head()), make_hidden(0, 1)
    runs: list[int] = []
    best = Candidates.best
    monkeypatch.setattr(Candidates, "best", lambda self: runs.append(1) or best(self))
    head.weight[head.always_on_ids] = hidden  # sure
    likeliest(head, head.score(hidden))
    assert not runs
    head.weight[head.always_on_ids] = -hidden  # and anything but
    head.weight[head.expert_ids[picked_experts(head, hidden)[0]].unique()] = -hidden
    likeliest(head, head.score(hidden))
    assert runs == [1]


@pytest.mark.parametrize("combine", COMBINES)
def test_masses_are_those_of_the_logits_of_scored_and_unscored_tokens(combine: str) -> None:
    head, hidden = make_head(combine=combine), make_hidden(0, 20) * 0.3
    logits, scored = head.sparse_logits(hidden), head.score(hidden)
    masses = zip(logits, hidden, head.mass_outside(scored), head.mass_inside(scored), strict=True)
    for row, state, outside, inside in masses:
        is_inside = torch.zeros_like(row, dtype=torch.bool)
        is_inside[head.scored_ids(head.pick(state.unsqueeze(0)).experts)[0]] = True
        assert abs(outside - row[~is_inside].logsumexp(-1)) < 1e-4
        assert abs(inside - row[is_inside].logsumexp(-1)) < 1e-4
