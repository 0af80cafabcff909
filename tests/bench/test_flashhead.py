"""The FlashHead baseline: its clusters, centroids and probes, against plain references."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_topk.bench.flashhead import FlashHead
from hf_topk.model.errors import InputError

VOCAB_SIZE, HIDDEN_SIZE = 100, 16


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def weight(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1)).to(request.param)


def some_states() -> Tensor:
    return torch.randn(50, HIDDEN_SIZE, generator=torch.Generator().manual_seed(2))


def some_clusters(size: int = 8) -> Tensor:
    """Random clusters; the last one is short and repeats its first id."""
    order = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(3))
    missing = -VOCAB_SIZE % size
    return torch.cat([order, order[-(size - missing)].expand(missing)]).view(-1, size)


def test_centroids_are_unit_mean_directions(weight: Tensor) -> None:
    head = FlashHead(weight, None, some_clusters())
    assert head.centroids.dtype == weight.dtype
    for centroid, ids in zip(head.centroids, some_clusters().tolist(), strict=True):
        rows = weight[sorted(set(ids))].float()
        mean = (rows / rows.norm(dim=-1, keepdim=True)).mean(dim=0)
        atol = 1e-6 if weight.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(centroid.float(), mean / mean.norm(), atol=atol, rtol=0)


def test_one_probe_in_sixteen_clusters() -> None:
    weight = torch.randn(4096, 4)
    assert FlashHead(weight, None, torch.arange(4096).view(-1, 16)).num_probes == 16
    assert FlashHead(weight[:64], None, torch.arange(64).view(-1, 16)).num_probes == 1


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_probes", [1, 4, 13])
def test_the_next_token_is_the_best_of_the_probed_clusters(num_probes: int, has_bias: bool) -> None:
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(4)) if has_bias else None
    head, states = FlashHead(weight, bias, some_clusters(), num_probes), some_states()
    found = head.next_tokens(states)
    for state, token, probed in zip(states, found.tolist(), head.probe(states).tolist(), strict=True):
        order = sorted(range(13), key=lambda cluster: -float(head.centroids[cluster] @ state))
        assert probed == order[:num_probes]
        tokens = some_clusters()[probed].flatten().tolist()
        logits = F.linear(state, weight, bias)
        assert token == max(tokens, key=lambda one: float(logits[one]))
    if num_probes == 13:
        assert torch.equal(found, F.linear(states, weight, bias).argmax(dim=-1))


def test_bytes_read_count_the_centroids(weight: Tensor) -> None:
    head = FlashHead(weight, torch.zeros(VOCAB_SIZE, dtype=weight.dtype), some_clusters(), 3)
    assert head.bytes_read() == (13 * HIDDEN_SIZE + 3 * 8 * (HIDDEN_SIZE + 1)) * weight.itemsize
    assert FlashHead(weight, None, some_clusters(), 3).bytes_read() == (13 + 3 * 8) * HIDDEN_SIZE * weight.itemsize


@pytest.mark.parametrize("num_probes", [0, -1, 14])
def test_refuses_more_probes_than_clusters(num_probes: int) -> None:
    with pytest.raises(InputError, match=f"num_probes is {num_probes}, must be from 1 to the 13 clusters"):
        FlashHead(torch.randn(VOCAB_SIZE, HIDDEN_SIZE), None, some_clusters(), num_probes)
