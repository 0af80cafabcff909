"""The screen: exact logits for the likeliest tokens of the picked experts, estimates for the rest."""

import pytest
import torch
from head_helpers import CLOSE, dense_logits, make_head, make_hidden, picked_experts, seeds, sizes, unique_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_topk import TopKExpertsHead
from hf_topk.kernels import expert_packed_logits, pack, packed_logits_reference


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("positions", [1, 5])
def test_product_of_picked_experts(bits, positions):
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, 2**bits, (7, 3, 16), generator=generator)
    codes, experts = pack(numbers.flatten(0, 1), bits).unflatten(0, (7, 3)), torch.randint(0, 7, (positions, 4))
    inputs = torch.randn(positions, 16, generator=generator)
    every = packed_logits_reference(inputs, codes.flatten(0, 1), bits).unflatten(-1, (7, 3))
    expected = every.gather(1, experts.unsqueeze(-1).expand(-1, -1, 3))
    torch.testing.assert_close(expert_packed_logits(inputs, codes, bits, experts), expected)
    compiled = torch.compile(expert_packed_logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs, codes, bits, experts), expected)


def screen_head(num_rescored: int, **choices: object) -> TopKExpertsHead:
    return make_head(tail="screen", num_rescored=num_rescored, **choices)


def expected_logits(head: TopKExpertsHead, hidden: Tensor) -> Tensor:
    """Worked out position by position, expert by expert."""
    dense, scores = dense_logits(head, hidden).float(), head.router(hidden)
    expected = torch.full_like(dense, -torch.inf)
    for position, picked in enumerate(picked_experts(head, hidden)):
        every_expert = torch.arange(head.num_experts).expand(1, -1)
        within = head.tail.screen(hidden[position : position + 1], every_expert)[0]
        estimates = {}
        for expert in range(head.num_experts):
            ids = unique_ids(head, expert)
            places = [head.expert_ids[expert].tolist().index(token) for token in ids.tolist()]
            if expert in picked:
                share = within[expert, places].log_softmax(dim=0)
                estimates |= {
                    int(token): float(scores[position, expert] + one) for token, one in zip(ids, share, strict=True)
                }
            else:
                expected[position, ids] = scores[position, expert] + head.tail.log_prior[expert, places]
        best = sorted(estimates, key=estimates.__getitem__, reverse=True)[: head.num_rescored]
        estimated = torch.tensor([estimates[token] for token in best]).logsumexp(dim=0)
        offset = dense[position, best].logsumexp(dim=0) - estimated
        expected[position, list(estimates)] = torch.tensor(list(estimates.values()))
        expected[position] += offset
        expected[position, best] = dense[position, best]
    expected[:, head.always_on_ids] = dense[:, head.always_on_ids]
    return expected


@settings(max_examples=50, deadline=None)
@given(seed=seeds, positions=st.integers(1, 4), choices=sizes(), data=st.data())
def test_logits_are_those_worked_out(seed, positions, choices, data):
    num_rescored = data.draw(st.integers(1, 40))
    head, hidden = screen_head(num_rescored, **choices), make_hidden(seed, positions)
    if not head.screens:
        return
    torch.testing.assert_close(head.sparse_logits(hidden), expected_logits(head, hidden), **CLOSE[torch.float32])


@settings(max_examples=50, deadline=None)
@given(seed=seeds, positions=st.integers(1, 4), choices=sizes(), num_rescored=st.integers(1, 60))
def test_laws(seed, positions, choices, num_rescored):
    head, hidden = screen_head(num_rescored, **choices), make_hidden(seed, positions)
    logits, dense = head.sparse_logits(hidden), dense_logits(head, hidden)
    assert logits.isfinite().all()
    scored = head.score(hidden)
    ids = torch.cat([head.always_on_ids.expand(positions, -1), scored.ids.flatten(1)], dim=-1)
    torch.testing.assert_close(logits.gather(1, ids), dense.gather(1, ids), **CLOSE[torch.float32])
    torch.testing.assert_close(head.greedy_logits(hidden).argmax(dim=-1), logits.argmax(dim=-1))
    head.num_experts_per_tok = head.num_experts
    torch.testing.assert_close(head.sparse_logits(hidden), dense, **CLOSE[torch.float32])


def test_as_many_as_are_picked_need_no_screen():
    head, hidden = screen_head(2 * 16), make_hidden(0, 3)
    assert not head.screens
    prior = make_head(tail="prior")
    prior.tail.log_prior = head.tail.log_prior
    prior.router = head.router
    torch.testing.assert_close(head.sparse_logits(hidden), prior.sparse_logits(hidden))


def test_share_outside_of_what_was_picked():
    head, hidden = screen_head(5, num_experts_per_tok=3), make_hidden(1, 6)
    logits, outside = head.draft_logits(hidden)
    picked = torch.zeros_like(logits, dtype=torch.bool)
    picked[:, head.always_on_ids] = True
    for position, experts in enumerate(picked_experts(head, hidden)):
        picked[position, head.expert_ids[experts].flatten()] = True
    expected = logits.softmax(dim=-1).masked_fill(picked, 0).sum(dim=-1)
    torch.testing.assert_close(outside, expected, rtol=1e-3, atol=1e-4)


def test_compiles_to_one_graph():
    head, hidden = screen_head(5), make_hidden(2, 2)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden), head(hidden), **CLOSE[torch.float32])


def test_bytes_read():
    head = screen_head(5)
    per_token = head.tail.codes_4bit.shape[-1] + head.tail.codes_2bit.shape[-1] + 4
    fixed = sum(one.nbytes for one in (head.tail.basis, head.tail.center, head.tail.log_prior))
    router = sum(one.nbytes for one in head.router.state_dict().values())
    assert head.bytes_read() == (8 + 5) * 4 * 32 + 2 * 16 * per_token + fixed + router
