"""The always-on tokens and the experts, against plain references."""

import pytest
import torch
from support.tiny_models import VOCAB_SIZE, tiny_converted, tiny_dense
from torch import Tensor

from hf_topk import TopKExpertsHead
from hf_topk.convert import Recipe
from hf_topk.convert.steps import distill as distillation
from hf_topk.convert.steps.distill import TokenStatistics, groups_of, token_statistics
from hf_topk.convert.steps.partition import partition
from hf_topk.convert.steps.place_tokens import choose_always_on, place_tokens


def some_states(count: int = 40) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(4))


def placed(seed: int = 0) -> tuple[TopKExpertsHead, TokenStatistics]:
    """A head of 5 always-on tokens and 6 experts of 16; the last expert has 15 tokens."""
    head = tiny_converted(num_always_on=5).head
    statistics = token_statistics(some_states(), head.weight, None)
    place_tokens(head, [0, 98], [], statistics, seed)
    return head, statistics


def test_every_routed_token_is_in_one_expert() -> None:
    head, _ = placed()
    experts = head.expert_ids
    kept = torch.ones_like(experts, dtype=torch.bool)
    kept[:, 1:] = experts[:, 1:] != experts[:, :1]
    assert (~kept).sum() == 1
    assert not kept[-1, -1]  # what fills the last expert up stands at its end
    assert sorted([*experts[kept].tolist(), *head.always_on_ids.tolist()]) == list(range(VOCAB_SIZE))


def test_experts_are_k_means_clusters_of_contexts() -> None:
    for seed in (0, 1):
        head, statistics = placed(seed)
        routed = torch.tensor([token for token in range(VOCAB_SIZE) if token not in head.always_on_ids])
        assert torch.equal(head.expert_ids, routed[partition(statistics.contexts[routed], 16, seed)])
    assert not torch.equal(head.expert_ids, placed()[0].expert_ids)


def test_tokens_that_are_likely_in_the_same_contexts_share_an_expert() -> None:
    """Four groups of tokens, of different row norms, each likely in contexts of its own."""
    head = tiny_converted(num_always_on=0, num_experts=4, expert_size=25).head
    kinds = torch.arange(VOCAB_SIZE) % 4
    generator = torch.Generator().manual_seed(6)
    directions = torch.linalg.qr(torch.randn(32, 4, generator=generator)).Q.t()
    lengths = torch.rand(VOCAB_SIZE, 1, generator=generator) + 1
    weight = lengths * directions[kinds] * 3
    states = (3 * directions).repeat(10, 1) + 0.1 * some_states()
    place_tokens(head, [], [], token_statistics(states, weight, None), 0)
    assert all(len(kinds[expert].unique()) == 1 for expert in head.expert_ids)


@pytest.mark.parametrize("has_bias", [False, True])
def test_contexts_are_mean_states_weighted_by_probability(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "ROWS_AT_ONCE", 7)  # so that blocks have edges
    monkeypatch.setattr(distillation, "LOGIT_BYTES_AT_ONCE", 4 * VOCAB_SIZE * 9)
    states, weight = some_states(), tiny_dense().get_output_embeddings().weight.detach() * 0.1
    bias = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(5)) if has_bias else None
    logits = (states @ weight.t() + (0.0 if bias is None else bias)).double()
    probabilities = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    expected = torch.stack([(p.unsqueeze(-1) * states).sum(dim=0) / p.sum() for p in probabilities.t()])
    torch.testing.assert_close(token_statistics(states, weight, bias).contexts, expected.float())


def test_a_token_without_probability_has_a_finite_context() -> None:
    bias = torch.zeros(VOCAB_SIZE)
    bias[5] = -1e4  # its probability is 0 in any float type
    assert token_statistics(some_states(), torch.ones(VOCAB_SIZE, 32), bias).contexts.isfinite().all()


def test_special_tokens_are_always_on_before_likely_ones() -> None:
    probabilities = torch.linspace(0.1, 1, 10)
    assert choose_always_on(probabilities, [3, 1], 4).tolist() == [1, 3, 8, 9]
    assert choose_always_on(probabilities, [3, 1], 1).tolist() == [3]
    assert choose_always_on(probabilities, [12, 3], 2).tolist() == [3, 9]  # 12 is beyond the head
    assert choose_always_on(probabilities, [9], 3).tolist() == [7, 8, 9]
    assert choose_always_on(probabilities, [3], 0).tolist() == []
    assert choose_always_on(probabilities, [-1, 3], 2).tolist() == [3, 9]  # -1 says that there is none


@pytest.mark.parametrize("num_always_on", [0, 1, 2, 8, 20])
def test_every_token_is_placed_once_and_end_tokens_are_always_on(num_always_on: int) -> None:
    num_experts = Recipe(num_always_on=num_always_on).resolve(VOCAB_SIZE).num_experts
    head = tiny_converted(num_experts=num_experts, num_always_on=num_always_on).head
    specials = [7, 0, 1]
    place_tokens(head, specials, [], token_statistics(some_states(), head.weight, None), 0)
    assert head.num_always_on == num_always_on
    assert set(specials[:num_always_on]) <= set(head.always_on_ids.tolist())
    assert sorted(torch.cat(groups_of(head)).tolist()) == list(range(VOCAB_SIZE))


@pytest.mark.parametrize("num_unused", [1, 16, 33, 90])
def test_unused_ids_have_experts_of_their_own(num_unused: int) -> None:
    """Together with the rarest other tokens, which complete them."""
    head = tiny_converted(num_always_on=4).head
    statistics = token_statistics(some_states(), head.weight, None)
    rarest = statistics.probabilities.argsort()
    unused = rarest[50 - num_unused // 2 :][:num_unused].tolist()  # as likely as any
    place_tokens(head, [0, 98], unused, statistics, 0)
    assert sorted([*head.expert_ids.flatten().tolist(), *head.always_on_ids.tolist()]) == list(range(VOCAB_SIZE))
    routed = {token for token in unused if token not in head.always_on_ids}
    of_them = [expert for expert in head.expert_ids.tolist() if routed & set(expert)]
    others = [int(token) for token in rarest if token not in head.always_on_ids and int(token) not in routed]
    count = -(-len(routed) // 16) * 16 - len(routed)
    assert sorted(token for expert in of_them for token in expert) == sorted([*routed, *others[:count]])
