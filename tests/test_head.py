"""The head's laws: what all experts give, what scored tokens get, what the tail gets, and what is read."""

import copy
import math

import pytest
import torch
from head_helpers import (
    CLOSE,
    COMBINES,
    TAILS,
    dense_logits,
    make_head,
    make_hidden,
    picked_experts,
    scored_mask,
    seeds,
    sizes,
    unique_ids,
)
from helpers import VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_topk import TopKExpertsHead, head, kernels


def exact_mass(head: TopKExpertsHead, logits: Tensor, experts: list[int]) -> Tensor:
    """Log-sum-exp of one position's logits over the experts, each of their tokens once."""
    return logits.double()[torch.cat([unique_ids(head, expert) for expert in experts])].logsumexp(-1)


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes(),
    tail=st.sampled_from(TAILS),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    positions=st.sampled_from([1, 2, 7]),
    gathers=st.booleans(),
    seed=seeds,
)
def test_all_experts_give_the_dense_logits(
    sizes: dict[str, int], tail: str, bias: bool, dtype: torch.dtype, positions: int, gathers: bool, seed: int
) -> None:
    sizes["num_experts_per_tok"] = sizes["num_experts"]
    head, hidden = make_head(bias=bias, dtype=dtype, tail=tail, **sizes), make_hidden(seed, positions, dtype)
    with pytest.MonkeyPatch.context() as patch:
        if gathers:
            patch.setattr(kernels, "SHARE_WORTH_ALL_ROWS", math.inf)
        logits = head(hidden)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, dense_logits(head, hidden), **CLOSE[dtype])


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes(),
    tail=st.sampled_from(TAILS),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    positions=st.sampled_from([1, 5]),
    seed=seeds,
)
def test_scored_tokens_have_their_dense_logits(
    sizes: dict[str, int], tail: str, bias: bool, dtype: torch.dtype, positions: int, seed: int
) -> None:
    head, hidden = make_head(bias=bias, dtype=dtype, tail=tail, **sizes), make_hidden(seed, positions, dtype)
    logits, dense, scored = head(hidden), dense_logits(head, hidden), scored_mask(head, hidden)
    torch.testing.assert_close(logits[scored], dense[scored], **CLOSE[dtype])
    if tail == "none":
        assert logits[~scored].isneginf().all()
    else:
        assert logits.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes(),
    tail=st.sampled_from(["low_rank", "prior"]),
    bias=st.booleans(),
    positions=st.integers(1, 3),
    seed=seeds,
)
def test_unscored_expert_has_the_mass_of_its_aligned_score(
    sizes: dict[str, int], tail: str, bias: bool, positions: int, seed: int
) -> None:
    head, hidden = make_head(bias=bias, tail=tail, **sizes), make_hidden(seed, positions)
    logits, dense, scores = head(hidden), dense_logits(head, hidden), head.router(hidden).double()
    for position, picked in enumerate(picked_experts(head, hidden)):
        offset = exact_mass(head, dense[position], picked) - scores[position, picked].logsumexp(-1)
        for expert in set(range(head.num_experts)) - set(picked):
            mass = exact_mass(head, logits[position], [expert])
            torch.testing.assert_close(mass, scores[position, expert] + offset, rtol=1e-5, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes(), tail=st.sampled_from(TAILS), bias=st.booleans(), positions=st.integers(1, 3), seed=seeds)
def test_router_combine_gives_every_expert_its_score(
    sizes: dict[str, int], tail: str, bias: bool, positions: int, seed: int
) -> None:
    head, hidden = make_head(bias=bias, tail=tail, combine="router", **sizes), make_hidden(seed, positions)
    logits, dense, scores = head(hidden), dense_logits(head, hidden), head.router(hidden)
    always = head.always_on_ids
    torch.testing.assert_close(logits[:, always], dense[:, always], **CLOSE[torch.float32])
    for position, picked in enumerate(picked_experts(head, hidden)):
        for expert in picked if tail == "none" else range(head.num_experts):
            mass = exact_mass(head, logits[position], [expert])
            torch.testing.assert_close(mass, scores[position, expert].double(), rtol=1e-5, atol=1e-3)
        for expert in picked:  # within an expert the dense head's own proportions
            ids = unique_ids(head, expert)
            within, expected = logits[position, ids].log_softmax(-1), dense[position, ids].log_softmax(-1)
            torch.testing.assert_close(within, expected, **CLOSE[torch.float32])


@settings(max_examples=30, deadline=None)
@given(sizes=sizes(), tail=st.sampled_from(TAILS), positions=st.integers(1, 3), seed=seeds)
def test_fresh_combiner_changes_nothing(sizes: dict[str, int], tail: str, positions: int, seed: int) -> None:
    exact, learned = (make_head(tail=tail, combine=combine, **sizes) for combine in ("exact", "learned"))
    hidden = make_hidden(seed, positions)
    torch.testing.assert_close(learned(hidden), exact(hidden), **CLOSE[torch.float32])


@pytest.mark.parametrize("tail", TAILS)
def test_combiner_shifts_and_gates(tail: str) -> None:
    exact, learned = (make_head(tail=tail, combine=combine) for combine in ("exact", "learned"))
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
@pytest.mark.parametrize("tail", TAILS)
def test_positions_do_not_depend_on_one_another(tail: str, combine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are batched, shaped, or worked off in turns."""
    sparse, hidden = make_head(tail=tail, combine=combine), make_hidden(0, 12)
    together = sparse(hidden)
    one_by_one = torch.cat([sparse(one) for one in hidden.split(1)])
    torch.testing.assert_close(together, one_by_one, **CLOSE[torch.float32])
    torch.testing.assert_close(sparse(hidden.view(3, 4, 32)), together.view(3, 4, VOCAB_SIZE))
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 5 * VOCAB_SIZE)
    torch.testing.assert_close(sparse(hidden), together, **CLOSE[torch.float32])


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("tail", TAILS)
def test_runs_under_autocast(tail: str, combine: str) -> None:
    head, hidden = make_head(tail=tail, combine=combine), make_hidden(0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits, dense = head(hidden), dense_logits(head, hidden)
    assert logits.dtype == dense.dtype == torch.bfloat16
    assert not logits.isnan().any()
    assert logits.isfinite().all() == (tail != "none")
    always = head.always_on_ids
    torch.testing.assert_close(logits[:, always], dense[:, always], **CLOSE[torch.bfloat16])


# Modes


@torch.no_grad()
def test_auto_is_sparse_up_to_its_most_positions() -> None:
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
def test_dense_and_sparse_hold_whatever_the_positions(positions: int) -> None:
    head, hidden = make_head(head_mode="dense"), make_hidden(0, positions)
    with torch.no_grad():
        assert head(hidden).equal(dense_logits(head, hidden))
    head.head_mode = "sparse"
    assert head(hidden).equal(head.sparse_logits(hidden))
    assert not head(hidden).equal(dense_logits(head, hidden))


# What is read


@pytest.mark.parametrize(
    ("router", "router_bytes"),
    [
        ("centroid", 4 * (6 * 32 + 6)),
        ("linear", 4 * (6 * 32 + 6)),
        ("low_rank", 4 * (6 * 32 + 6 + 4 * 32 + 6 * 4)),
        ("mlp", 4 * (6 * 32 + 6 + 4 * 32 + 4 + 6 * 4)),
        ("attention", 4 * (6 * 4 * 32 + 6 * 4)),
    ],
)
@pytest.mark.parametrize(
    ("tail", "tail_bytes"),
    [
        ("none", 0),
        ("prior", 4 * 6 * 16),
        ("low_rank", 4 * (6 * 32 + 6) + 6 * 16 * 2 + 4 * 6 * 16),  # rank 4 takes 2 bytes and fills them with 6
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_read(router: str, router_bytes: int, tail: str, tail_bytes: int, bias: bool) -> None:
    head = make_head(bias=bias, router_type=router, tail=tail)
    row = 4 * (32 + bias)
    assert head.bytes_read() == (8 + 2 * 16) * row + router_bytes + tail_bytes
    assert head.dense_bytes() == 100 * row
    assert head.added_bytes() == router_bytes + tail_bytes + 8 * (8 + 6 * 16)
    head.num_experts_per_tok = 3
    assert head.bytes_read() == (8 + 3 * 16) * row + router_bytes + tail_bytes


def test_bytes_read_in_half_the_bytes() -> None:
    head = make_head(dtype=torch.bfloat16, tail="none", router_type="linear").to(torch.bfloat16)
    assert head.bytes_read() == 2 * (40 * 32 + 6 * 32 + 6)
    assert head.dense_bytes() == 2 * 100 * 32


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
    tail=st.sampled_from(TAILS),
    bias=st.booleans(),
    vocab_size=st.integers(60, 140),
    positions=st.sampled_from([1, 4]),
    seed=seeds,
)
def test_taking_over_a_resized_head(
    sizes: dict[str, int], tail: str, bias: bool, vocab_size: int, positions: int, seed: int
) -> None:
    head, hidden = copy.deepcopy(make_head(bias=bias, tail=tail, **sizes)), make_hidden(seed, positions)
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
    assert logits[~scored].isfinite().all() if tail != "none" else logits[~scored].isneginf().all()
    head.num_experts_per_tok = head.num_experts
    torch.testing.assert_close(head(hidden), dense, **CLOSE[torch.float32])


@pytest.mark.parametrize("tail", ["low_rank", "prior"])
@pytest.mark.parametrize("vocab_size", [70, 99])
def test_shrinking_keeps_the_tail_of_the_tokens_left(tail: str, vocab_size: int) -> None:
    head, hidden = make_head(tail=tail), make_hidden(0, 3)
    before = head(hidden)[:, :vocab_size].log_softmax(-1)
    picked, scored = picked_experts(head, hidden), scored_mask(head, hidden)[:, :vocab_size]
    layer = resized(head, vocab_size)
    head.take_over(layer)
    after = head(hidden).log_softmax(-1)
    for position in range(3):
        for expert in set(range(head.num_experts)) - set(picked[position]):
            ids = unique_ids(head, expert)
            assert not scored[position, ids].any()
            within, expected = after[position, ids].log_softmax(-1), before[position, ids].log_softmax(-1)
            torch.testing.assert_close(within, expected, rtol=1e-5, atol=1e-3)


# Experts up to a share of the probability


@settings(max_examples=60, deadline=None)
@given(
    sizes=sizes(),
    tail=st.sampled_from(TAILS),
    combine=st.sampled_from(COMBINES),
    share=st.floats(0.01, 1.0),
    positions=st.sampled_from([1, 4]),
    compiles=st.booleans(),
    seed=seeds,
)
def test_experts_are_scored_up_to_a_share_of_the_probability(
    sizes: dict[str, int], tail: str, combine: str, share: float, positions: int, compiles: bool, seed: int
) -> None:
    head, hidden = make_head(tail=tail, combine=combine, **sizes), make_hidden(seed, positions) * 0.3
    most, head.routed_mass = head.num_experts_per_tok, share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: compiles)
        logits = head(hidden)
    head.routed_mass = 1.0
    for row, state in zip(logits, hidden, strict=True):
        certain = dense_logits(head, state)[head.always_on_ids].logsumexp(-1).exp()
        masses = head.router(state.unsqueeze(0))[0].exp().sort(descending=True).values
        total = certain + masses.sum()
        reached = [float((certain + masses[:count].sum()) / total) for count in range(1, most + 1)]
        if any(abs(one - share) < 1e-5 for one in reached):
            return  # too near to call
        head.num_experts_per_tok = next((count for count, one in enumerate(reached, 1) if one >= share), most)
        torch.testing.assert_close(row, head(state.unsqueeze(0))[0], **CLOSE[torch.float32])


def test_a_smaller_share_scores_fewer_experts() -> None:
    head, hidden, counts = make_head(num_experts_per_tok=6), make_hidden(0, 50) * 0.3, []
    for head.routed_mass in (0.2, 0.6, 0.9, 1.0):
        picked = head.pick(hidden)
        counts.append(picked.experts.numel() if picked.is_used is None else int(picked.is_used.sum()))
    assert 50 <= counts[0] < counts[1] < counts[2] < counts[3] == 300


@settings(max_examples=100, deadline=None)
@given(
    sizes=sizes(),
    tail=st.sampled_from(TAILS),
    combine=st.sampled_from(COMBINES),
    spread=st.sampled_from([0.01, 0.3, 3.0]),
    positions=st.sampled_from([1, 4]),
    seed=seeds,
)
def test_greedy_logits_have_the_argmax_of_the_sparse_ones(
    sizes: dict[str, int], tail: str, combine: str, spread: float, positions: int, seed: int
) -> None:
    head, hidden = make_head(tail=tail, combine=combine, **sizes), make_hidden(seed, positions) * spread
    logits, greedy = head.sparse_logits(hidden), head.greedy_logits(hidden)
    assert logits.argmax(-1).equal(greedy.argmax(-1))
    scored = scored_mask(head, hidden)
    torch.testing.assert_close(greedy[scored], logits[scored])
    torch.testing.assert_close(head.draft_logits(hidden, is_greedy=True)[0], greedy)


def test_greedy_logits_need_the_tail_only_where_it_could_win(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden = make_head(num_experts_per_tok=2), make_hidden(0, 1)
    runs: list[int] = []
    tail = head.tail.forward
    monkeypatch.setattr(head.tail, "forward", lambda hidden: runs.append(len(hidden)) or tail(hidden))
    head.weight[head.always_on_ids] = hidden  # sure
    head.greedy_logits(hidden)
    assert not runs
    head.weight[head.always_on_ids] = -hidden  # and anything but
    head.weight[head.expert_ids[picked_experts(head, hidden)[0]].unique()] = -hidden
    head.greedy_logits(hidden)
    assert runs == [1]
    head.greedy_logits(torch.cat([-hidden, hidden, -hidden]))
    assert runs == [1, 1]


@pytest.mark.parametrize(("combine", "share"), [("exact", 1.0), ("router", 0.5), ("learned", 0.5), ("router", 1.0)])
def test_drafts_know_how_much_lies_outside_of_what_was_scored(combine: str, share: float) -> None:
    head, hidden = make_head(combine=combine, routed_mass=share), make_hidden(0, 20) * 0.3
    logits, outside = head.draft_logits(hidden)
    torch.testing.assert_close(logits, head.sparse_logits(hidden))
    for row, state, share_outside in zip(logits, hidden, outside, strict=True):
        picked = head.pick(state.unsqueeze(0))
        inside = row.softmax(-1)[head.scored_ids(picked.experts)[0].unique()].sum()
        assert abs(share_outside - 1 + inside) < 1e-4
