"""What tokens share an expert by: rows, frequency and context, beside the plainest way to compute each."""

import dataclasses
import itertools
from typing import get_args

import pytest
import torch
from helpers import QUICK, VOCAB_SIZE, tiny_converted, tiny_dense, tiny_tokenizer
from torch import Tensor

from hf_topk.convert import Recipe, convert
from hf_topk.convert import distill as distillation
from hf_topk.convert.distill import groups_of, token_statistics
from hf_topk.convert.features import choose_always_on, place_tokens, share_out
from hf_topk.convert.partition import partition
from hf_topk.convert.recipe import PartitionType
from hf_topk.text import Window

PARTITIONS = get_args(PartitionType)
ALWAYS_ON = torch.tensor([0, 3, 50, 51, 98])  # 95 are left: 6 experts of 16, the last of them one short


def some_states(count: int = 40) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(4))


def shared_out(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Experts, the weight and token probabilities."""
    weight, states = tiny_dense().get_output_embeddings().weight.detach(), some_states()
    statistics = token_statistics(states, weight, None)
    recipe = Recipe(partition=kind, expert_size=16)
    return share_out(recipe, ALWAYS_ON, weight, statistics), weight, statistics.probabilities


@pytest.mark.parametrize("kind", PARTITIONS)
def test_every_routed_token_is_in_one_expert(kind: str) -> None:
    experts, _, _ = shared_out(kind)
    assert experts.shape == (6, 16)
    kept = torch.ones_like(experts, dtype=torch.bool)
    kept[:, 1:] = experts[:, 1:] != experts[:, :1]
    assert (~kept).sum() == 1
    assert not kept[-1, -1]  # what fills the last expert up stands at its end
    assert sorted([*experts[kept].tolist(), *ALWAYS_ON.tolist()]) == list(range(VOCAB_SIZE))


def test_frequency_puts_neighbours_in_rank_together() -> None:
    experts, _, probabilities = shared_out("frequency")
    for likelier, less_likely in itertools.pairwise(experts):
        assert probabilities[likelier].min() >= probabilities[less_likely].max()
    assert all((expert[:15].diff() > 0).all() for expert in experts)


def test_rows_and_context_are_kmeans_on_their_features() -> None:
    routed = torch.tensor([token for token in range(VOCAB_SIZE) if token not in ALWAYS_ON])
    experts, weight, _ = shared_out("rows")
    assert torch.equal(experts, routed[partition(weight[routed], 16, 0)])
    experts, weight, _ = shared_out("context")
    contexts = token_statistics(some_states(), weight, None).contexts
    assert torch.equal(experts, routed[partition(contexts[routed], 16, 0)])


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


def test_a_token_that_is_likely_nowhere_has_a_context() -> None:
    bias = torch.zeros(VOCAB_SIZE)
    bias[5] = -1e4  # its probability is 0 in any float type
    assert token_statistics(some_states(), torch.ones(VOCAB_SIZE, 32), bias).contexts.isfinite().all()


@pytest.mark.parametrize("kind", PARTITIONS)
def test_a_conversion_follows_its_partition(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    windows = [Window(n, tuple(torch.randint(VOCAB_SIZE, (40,), generator=generator).tolist())) for n in range(8)]
    recipe = Recipe(**QUICK, partition=kind, num_always_on=0)
    report = convert(tiny_dense(), tiny_tokenizer(), recipe, windows=windows)
    assert report.recipe.partition == kind
    other = dataclasses.replace(recipe, partition=PARTITIONS[PARTITIONS.index(kind) - 1])
    ids = convert(tiny_dense(), tiny_tokenizer(), other, windows=windows).model.head.expert_ids
    assert not torch.equal(report.model.head.expert_ids, ids)


def test_special_tokens_are_always_on_before_likely_ones() -> None:
    probabilities = torch.linspace(0.1, 1, 10)
    assert choose_always_on(probabilities, [3, 1], 4).tolist() == [1, 3, 8, 9]
    assert choose_always_on(probabilities, [3, 1], 1).tolist() == [3]
    assert choose_always_on(probabilities, [12, 3], 2).tolist() == [3, 9]  # 12 is beyond the head
    assert choose_always_on(probabilities, [9], 3).tolist() == [7, 8, 9]
    assert choose_always_on(probabilities, [3], 0).tolist() == []
    assert choose_always_on(probabilities, [-1, 3], 2).tolist() == [3, 9]  # -1 says that there is none


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("num_always_on", [0, 1, 2, 8, 20])
def test_every_token_has_one_place_and_ends_of_text_are_always_on(num_always_on: int, kind: str) -> None:
    recipe = Recipe(expert_size=16, num_always_on=num_always_on, partition=kind).resolve(VOCAB_SIZE)
    head = tiny_converted(num_experts=recipe.num_experts(VOCAB_SIZE), num_always_on=num_always_on).head
    specials = [7, 0, 1]
    place_tokens(head, recipe, specials, token_statistics(some_states(), head.weight, None))
    assert head.num_always_on == num_always_on
    assert set(specials[:num_always_on]) <= set(head.always_on_ids.tolist())
    assert sorted(torch.cat(groups_of(head)).tolist()) == list(range(VOCAB_SIZE))
