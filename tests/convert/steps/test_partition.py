"""The partition: every token in one expert, experts of equal size, similar tokens together."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from hf_topk.convert.steps import partition as module
from hf_topk.convert.steps.bisection import bisect
from hf_topk.convert.steps.partition import _Auction, _Rows, partition
from hf_topk.model.errors import InputError


def check(experts: torch.Tensor, num_tokens: int, expert_size: int) -> torch.Tensor:
    """Check the shape and contents of the experts; return the expert of every token, [n]."""
    num_experts = math.ceil(num_tokens / expert_size)
    assert experts.dtype == torch.int64
    assert experts.shape == (num_experts, expert_size)
    expert_of = torch.full((num_tokens,), -1)
    for expert, slots in enumerate(experts.tolist()):
        own = sorted(set(slots))
        assert slots == own + [own[0]] * (expert_size - len(own)), "ascending, then the first one repeated"
        assert (expert_of[own] == -1).all(), "in one expert only"
        expert_of[own] = expert
    assert (expert_of >= 0).all(), "in one expert at least"
    return expert_of


def clusters(num_tokens: int, num_clusters: int, d: int, seed: int = 0) -> torch.Tensor:
    """Rows of overlapping clusters of very unequal sizes, like the rows of a head, [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_clusters, d, generator=generator)
    shares = 1 / torch.arange(1, num_clusters + 1)
    of = torch.multinomial(shares, num_tokens, replacement=True, generator=generator)
    return centres[of] + torch.randn(num_tokens, d, generator=generator)


def inertia(features: torch.Tensor, expert_of: torch.Tensor) -> float:
    """Total squared distance of the rows to the means of their experts."""
    return sum(
        float((rows - rows.mean(0)).square().sum()) for rows in (features[expert_of == e] for e in expert_of.unique())
    )


def greedy_assignment(features: torch.Tensor, centroids: torch.Tensor, expert_size: int) -> torch.Tensor:
    """Assign one token after another to the nearest centroid that is not full."""
    distance = torch.cdist(features, centroids)
    room = torch.full((len(centroids),), expert_size)
    expert_of = torch.empty(len(features), dtype=torch.int64)
    for token, row in enumerate(distance):
        expert_of[token] = torch.where(room > 0, row, torch.inf).argmin()
        room[expert_of[token]] -= 1
    return expert_of


def exact_assignment(features: torch.Tensor, centroids: torch.Tensor, expert_size: int) -> torch.Tensor:
    """The least total squared distance to given centroids, by the Hungarian method: [n]."""
    cost = torch.cdist(features.double(), centroids.double()).square()
    slot = linear_sum_assignment(cost.repeat_interleave(expert_size, dim=1).numpy())[1]
    return torch.from_numpy(slot) // expert_size


def auctioned_assignment(
    features: torch.Tensor, centroids: torch.Tensor, expert_size: int, finest: float
) -> torch.Tensor:
    """The assignment of the auction with given centroids, with decreasing increments."""
    rows = _Rows(features, torch.arange(len(features)), torch.zeros(features.shape[1]), 1.0)
    auction = _Auction(rows, expert_size, centroids)
    auction.search_all(lambda amount=1: None)
    for increment in (1e-1, 1e-2, finest):
        auction.run(increment, 100_000, lambda amount=1: None)
    return auction.expert_of[: len(features)]


@given(
    num_tokens=st.integers(1, 90),
    expert_size=st.integers(1, 40),
    d=st.integers(1, 6),
    distinct=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=30, deadline=None)
def test_every_token_is_in_one_expert_for_any_sizes(num_tokens, expert_size, d, distinct, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(min(distinct, num_tokens), d, generator=generator)
    features = values[torch.randint(len(values), (num_tokens,), generator=generator)].to(dtype)
    check(partition(features, expert_size, seed), num_tokens, expert_size)


@pytest.mark.parametrize("size", [1, 50, 64])
def test_one_slot_an_expert_and_one_expert_for_all(size):
    experts = partition(clusters(50, 5, 4), size, seed=0)
    assert check(experts, 50, size).tolist() == [token // size for token in range(50)]


def test_padding_slots_are_in_the_last_few_experts():
    experts = partition(clusters(1000 - 37, 20, 8), expert_size=50, seed=0)
    check(experts, 1000 - 37, 50)
    short = torch.tensor([len(slots.unique()) < 50 for slots in experts])
    assert 1 <= short.sum() <= 8
    assert short[-int(short.sum()) :].all()


def test_clusters_of_the_expert_size_are_kept_together():
    of = torch.randperm(320, generator=torch.Generator().manual_seed(1)) % 20
    features = 50 * torch.eye(20)[of] + torch.randn(320, 20, generator=torch.Generator().manual_seed(2))
    experts = partition(features, expert_size=16, seed=0)
    assert (of[experts] == of[experts[:, :1]]).all()


@pytest.mark.parametrize("expert_size", [8, 40])
def test_quality_is_near_plain_k_means_and_far_from_greedy(expert_size):
    features = clusters(1200, 40, 16)
    kmeans = KMeans(1200 // expert_size, n_init=1, random_state=0).fit(features.numpy())
    greedy = greedy_assignment(features, torch.from_numpy(kmeans.cluster_centers_), expert_size)
    ours = inertia(features, check(partition(features, expert_size, seed=0), 1200, expert_size))
    assert ours < 0.9 * inertia(features, greedy)
    assert ours < 1.1 * kmeans.inertia_


def test_distant_clusters_are_assigned_exactly():
    features = 3 * clusters(600, 12, 8) + torch.randn(600, 8, generator=torch.Generator().manual_seed(1))
    ours = inertia(features, check(partition(features, 20, seed=0), 600, 20))
    centroids = torch.from_numpy(KMeans(30, n_init=1, random_state=0).fit(features.numpy()).cluster_centers_)
    for _ in range(8):
        expert_of = exact_assignment(features, centroids, expert_size=20)
        centroids = torch.stack([features[expert_of == expert].mean(0) for expert in range(30)])
    assert ours < 1.1 * inertia(features, expert_of)


@pytest.mark.slow
def test_starting_from_bisection_is_about_as_good(monkeypatch):
    features = clusters(2000, 60, 16)
    whole = inertia(features, check(partition(features, 32, seed=0), 2000, 32))
    monkeypatch.setattr(module, "ALTERNATION_FLOPS", 1.0)
    monkeypatch.setattr(module, "KMEANS_FLOPS", 1.0)
    bisected = inertia(features, check(partition(features, 32, seed=0), 2000, 32))
    assert bisected < 1.05 * whole


@pytest.mark.parametrize("num_tokens", [60, pytest.param(53, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_nearest", [64, 3])
def test_the_auction_finds_the_known_optimum(num_tokens, num_nearest, monkeypatch):
    monkeypatch.setattr(module, "NEAREST_EXPERTS", num_nearest)
    features, centroids = clusters(num_tokens, 6, 5, seed=3), clusters(10, 3, 5, seed=4)
    expert_of = auctioned_assignment(features, centroids, expert_size=6, finest=1e-5)
    assert torch.equal(expert_of, exact_assignment(features, centroids, expert_size=6))


def test_a_coarse_increment_bounds_the_cost():
    features, centroids = clusters(400, 20, 8, seed=5), clusters(10, 3, 8, seed=6)
    expert_of = auctioned_assignment(features, centroids, expert_size=40, finest=1e-2)
    cost = torch.cdist(features.double(), centroids.double()).square()
    least = cost.gather(1, exact_assignment(features, centroids, expert_size=40)[:, None]).sum()
    total = cost.gather(1, expert_of[:, None]).sum()
    assert least <= total + 1e-6
    assert total <= least + 1e-2 * cost.amin(1).sum()


def test_zero_rounds_of_bids_give_a_partition(monkeypatch):
    monkeypatch.setattr(module, "ROUNDS_WHILE_ALTERNATING", 0)
    monkeypatch.setattr(module, "ROUNDS_AT_THE_END", 0)
    features = clusters(500, 10, 4)
    features[:300] = features[0]
    check(partition(features, 7, seed=0), 500, 7)


def test_hundreds_of_equal_rows_share_experts():
    features = clusters(1200, 40, 16)
    unused = torch.randperm(1200, generator=torch.Generator().manual_seed(0))[:300]
    features[unused] = 0.001 * torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    expert_of = check(partition(features, 20, seed=0), 1200, 20)
    assert len(expert_of[unused].unique()) <= 24, "15 would hold them, 60 are there"


def test_features_that_are_all_equal():
    check(partition(torch.full((70, 3), 0.1), 16, seed=0), 70, 16)
    check(partition(torch.zeros(70, 3), 16, seed=0), 70, 16)


def test_shift_and_scale_hardly_change_the_partition():
    features = clusters(600, 12, 8)
    plain = inertia(features, check(partition(features, 20, seed=0), 600, 20))
    moved = inertia(features, check(partition(1e-12 * (features + 500).double(), 20, seed=0), 600, 20))
    assert moved == pytest.approx(plain, rel=0.03)


def test_the_same_seed_gives_the_same_experts_without_global_effects():
    features = clusters(600, 30, 8)
    before, threads, state = features.clone(), torch.get_num_threads(), torch.get_rng_state()
    first = partition(features, 16, seed=5)
    assert torch.equal(first, partition(features, 16, seed=5))
    assert not torch.equal(first, partition(features, 16, seed=6))
    assert torch.equal(features, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_features_may_be_a_parameter_or_strided():
    features = torch.nn.Parameter(clusters(200, 8, 12))
    experts = partition(features, 16, seed=0)
    assert not experts.requires_grad
    assert torch.equal(experts, partition(features.detach().T.contiguous().T, 16, seed=0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_refused(value):
    features = clusters(40, 4, 4)
    features[[17, 31], 2] = value
    with pytest.raises(InputError, match=r"2 of the 40 rows .* row 17"):
        partition(features, 8, seed=0)


@pytest.mark.parametrize("size", [0, -1])
def test_an_expert_without_slots_is_refused(size):
    with pytest.raises(InputError, match=f"expert_size is {size}.* must be at least 1"):
        partition(torch.ones(4, 2), size, seed=0)


@pytest.mark.parametrize(
    "features", [torch.ones(4), torch.ones(0, 3), torch.ones(3, 0), torch.ones(4, 2, dtype=torch.int64)]
)
def test_features_that_are_not_a_float_matrix_are_refused(features):
    with pytest.raises(InputError, match="features must be floats of shape"):
        partition(features, 2, seed=0)


@given(num_tokens=st.integers(1, 90), expert_size=st.integers(1, 20), d=st.integers(1, 6), seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_bisection_fills_all_experts_but_the_last(num_tokens, expert_size, d, seed):
    rows = torch.randn(num_tokens, d, generator=torch.Generator().manual_seed(seed))
    num_experts = math.ceil(num_tokens / expert_size)
    sizes = bisect(rows, num_experts, expert_size).bincount(minlength=num_experts).tolist()
    assert sizes == [expert_size] * (num_experts - 1) + [num_tokens - expert_size * (num_experts - 1)]


def test_bisection_separates_distant_groups():
    of = torch.arange(8).repeat_interleave(12)[torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    corners = torch.tensor([[x, y, z] for x in (-9.0, 9.0) for y in (-9.5, 9.5) for z in (-10.0, 10.0)])
    expert_of = bisect(corners[of] + torch.rand(96, 3, generator=torch.Generator().manual_seed(1)), 8, 12)
    assert all(len(of[expert_of == expert].unique()) == 1 for expert in range(8))
