"""When lossless decoding stops drafting."""

import math

import pytest
from support.lossless import NEW_TOKENS, convert, generate, stats_of
from support.tiny_models import tiny_dense

from hf_topk import LosslessStats, TopKExpertsForCausalLM
from hf_topk.model import drafting
from hf_topk.model.drafting import passes_of_the_head


@pytest.fixture(scope="module")
def model() -> TopKExpertsForCausalLM:
    return convert(tiny_dense(tied=False))


def test_unsure_router_ends_a_block(monkeypatch: pytest.MonkeyPatch, model: TopKExpertsForCausalLM) -> None:
    monkeypatch.setattr(drafting, "DOUBT_A_PASS", 0.0)
    generate(model, lossless=True)
    assert stats_of(model) == LosslessStats(NEW_TOKENS, NEW_TOKENS, NEW_TOKENS, 0, 0)


def test_a_router_that_is_less_sure_drafts_on_where_the_head_costs_more(
    monkeypatch: pytest.MonkeyPatch, model: TopKExpertsForCausalLM
) -> None:
    drafted = []
    for doubt in (0.0, 1.0, 5.0, math.inf):
        monkeypatch.setattr(drafting, "DOUBT_A_PASS", doubt)
        generate(model, lossless=True)
        drafted.append(stats_of(model).drafted)
    assert drafted == sorted(drafted)
    assert len(set(drafted)) > 2


@pytest.mark.parametrize("tied", [False, True])
def test_the_cost_of_the_head_in_passes_of_the_decoder(tied: bool) -> None:
    dense = tiny_dense(tied=tied)
    layers = sum(one.numel() for one in dense.base_model.layers.parameters()) + dense.base_model.norm.weight.numel()
    expected = dense.get_output_embeddings().weight.numel() / layers
    assert passes_of_the_head(convert(dense)) == pytest.approx(expected, rel=0.01)  # there are some small buffers
