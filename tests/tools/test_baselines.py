"""The baseline heads of other packages: hnswlib's index and torchao's int8."""

import pytest
import torch
from support.heads import make_head
from torch.nn import functional as F

from hf_topk.bench.baselines import HnswHead, int8_head
from hf_topk.convert.steps.held_out import DenseArgmax
from studies.frontier import measure_frontier


@pytest.mark.parametrize("has_bias", [False, True])
def test_hnsw_finds_the_dense_argmax_in_an_exhaustive_search(has_bias: bool) -> None:
    weight, bias = torch.randn(300, 16), torch.randn(300) if has_bias else None
    hidden = torch.randn(7, 16)
    dense, logits = F.linear(hidden, weight, bias), HnswHead(weight, bias, ef=300, candidates=40)(hidden)
    assert torch.equal(logits.argmax(dim=-1), dense.argmax(dim=-1))
    found = logits.isfinite()
    assert found.sum(dim=-1).tolist() == [40] * 7
    torch.testing.assert_close(logits[found], dense[found], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torchao's own
@pytest.mark.parametrize("has_bias", [False, True])
def test_int8_rounds_the_dense_head(has_bias: bool) -> None:
    weight, bias = torch.randn(300, 64), torch.randn(300) if has_bias else None
    before = weight.clone()
    hidden = torch.randn(50, 64)
    with torch.inference_mode():
        logits = int8_head(weight, bias)(hidden)
    dense = F.linear(hidden, weight, bias)
    assert (logits.argmax(dim=-1) == dense.argmax(dim=-1)).float().mean() > 0.9
    assert 0 < (logits - dense).abs().max() < 0.5
    assert torch.equal(weight, before)


def test_the_frontier_has_the_index() -> None:
    head, states = make_head(), torch.randn(60, 32)  # of 100 tokens, among which the index looks everywhere
    best, documents = F.linear(states, head.weight).argmax(dim=-1), torch.zeros(60, dtype=torch.long)
    for agreement, expected in ((1.0, best), (0.0, (best + 1) % 100)):
        *_, point = measure_frontier(head, DenseArgmax(states, expected, documents, torch.zeros_like(expected)))
        assert (point.method, point.agreement, point.bytes_read) == ("HNSW", agreement, None)
