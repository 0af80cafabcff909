"""Router and tail, and their packed rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import dense_logits, make_head, make_hidden, seeds
from support.tiny_models import randomise
from torch import Tensor, nn

from hf_topk.convert.steps.pack_router_and_tail import fit_tail, metric_of, pack_router
from hf_topk.model.packed_rows import PackedRows, round_to_levels
from hf_topk.model.router import Router
from hf_topk.model.tail import Tail

float_types = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
HIDDEN = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
# Rank 1 fills a byte of two 4-bit directions and one of four 2-bit ones.
BASIS = [[127, 127], [0, 127], [127, 0], [0, 0], [0, 127], [0, 0]]
BASIS_SCALES = [1 / 127, 1 / 127, 1 / 127, 1, 2 / 127, 1]
CENTER = [1, 0, 0, 0, 0, 0]
# The coordinates of HIDDEN: (2, 2), (1, 0, 4, 0) and (-2, -1), (0, 0, -2, 0).
CODES_4BIT, CODES_2BIT = [[3 + 16 * 15], [0]], [[3 + 4 * 0 + 16 * 2 + 64 * 1], [1]]
# Which stand for -4.5, 7.5, 1.5, -1.5, 0.5, -0.5 in the first row, for -7.5, -7.5, -0.5, -1.5, -1.5, -1.5 in the other.
PRODUCTS = torch.tensor([[-4.5 * 2 + 7.5 * 2 + 1.5 * 1 + 0.5 * 4, -36.5], [-4.5 * -2 + 7.5 * -1 + 0.5 * -2, 25.5]])
ROUNDING = 0.3  # of these products, since coordinates are rounded to bfloat16


def set_values(module: nn.Module, **values: list) -> None:
    """Set every tensor of a module."""
    assert values.keys() == module.state_dict().keys()
    with torch.no_grad():
        for name, value in values.items():
            module.state_dict()[name].copy_(torch.tensor(value))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_router(seed: int, dtype: torch.dtype = torch.float32, *, is_packed: bool = False) -> Router:
    """A router of 16 dimensions and 5 experts."""
    router = Router(16, 5, 7, is_packed)
    randomise(router, seed)
    return router.to(dtype).requires_grad_(False)


def packed_from(rows: Tensor, states: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Router, Router]:
    """A router with these rows, and a packed copy for some states."""
    routers = []
    for _ in range(2):
        router = Router(rows.shape[1], len(rows), rank).requires_grad_(False)
        router.rows.copy_(rows)
        router.bias.copy_(normal(5, len(rows)))
        routers.append(router)
    pack_router(routers[1], metric_of(states), dtype)
    return routers[0], routers[1].to(dtype)


def error_share(scores: Tensor, exact: Tensor) -> float:
    """The mean square error, as a share of the variance of the scores over states."""
    return float(((scores - exact).square().mean() / exact.var(dim=0).mean()).detach())


# Packed rows


@settings(max_examples=40, deadline=None)
@given(seed=seeds, rows=st.integers(1, 9), rank=st.integers(1, 40))
def test_rounds_to_the_nearest_level(seed: int, rows: int, rank: int) -> None:
    packed = PackedRows(3, (rows,), rank)
    values = normal(seed, rows, len(packed.bits)) * 4
    rounded = round_to_levels(values, packed.bits) + 0.5
    for direction, bits in enumerate(packed.bits.tolist()):
        levels = torch.arange(2**bits) - (2**bits - 1) / 2
        nearest = (values[:, direction, None] - levels).abs().amin(dim=-1)
        torch.testing.assert_close((values - rounded)[:, direction].abs(), nearest)
        assert set(rounded[:, direction].tolist()) <= set(levels.tolist())
    packed.set_codes(slice(None), values)
    assert packed.coordinates().equal(rounded)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, experts=st.integers(1, 5), size=st.integers(1, 5), rank=st.integers(1, 40))
def test_a_third_of_the_directions_have_4_bits_in_full_bytes(seed: int, experts: int, size: int, rank: int) -> None:
    packed = PackedRows(3, (experts, size), rank)
    bits = packed.bits.tolist()
    assert rank <= len(bits) <= rank + 5
    assert bits == sorted(bits, reverse=True)
    assert abs(bits.count(4) - rank / 3) <= 2
    assert rank % 4 or rank < 8 or len(bits) == rank  # so that a rank that suits the kernels stays one
    assert sum(bits) == 8 * (packed.codes_4bit.shape[-1] + packed.codes_2bit.shape[-1])
    packed.set_codes(slice(None), coordinates := normal(seed, experts, size, len(bits)) * 3)
    whole = packed.coordinates().clone()
    packed.set_codes(slice(0, 1), -coordinates[:1])  # a part, and nothing else
    assert packed.coordinates()[1:].equal(whole[1:])
    assert packed.coordinates()[:1].equal(round_to_levels(-coordinates[:1], packed.bits) + 0.5)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, dtype=float_types, scale=st.sampled_from([1e-2, 1.0, 30.0]))
def test_basis_is_approximated_and_coordinates_are_zero_at_the_mean(
    seed: int, dtype: torch.dtype, scale: float
) -> None:
    packed, basis, mean = PackedRows(16, (3,), 12), normal(seed, 12, 16) * scale, normal(seed + 1, 16)
    packed.set_basis(basis, mean, dtype)
    # A scale that is stored in few digits can be less than the largest number takes.
    steps = basis.abs().amax(dim=-1, keepdim=True) / 127
    slack = 0.51 + 127 * torch.finfo(dtype).eps
    assert ((packed.float_basis() - basis) / steps).abs().max() <= slack
    assert packed.basis_scales.to(dtype).float().equal(packed.basis_scales)
    assert packed.center.equal((packed.float_basis() @ mean).bfloat16().float())


def exact_products(packed: PackedRows, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Products in floats with the bias, [N, rows], and the tolerance of four roundings to bfloat16."""
    basis, hidden = packed.float_basis(), hidden.float()
    codes = packed.coordinates().flatten(0, -2)
    projected = hidden @ basis.T - packed.center.float()
    first = 2.0**-7 * hidden.abs() @ basis.abs().T  # (N, r)
    return projected @ codes.T + packed.bias.flatten(), (first + 2.0**-7 * (projected.abs() + first)) @ codes.abs().T


@settings(max_examples=40, deadline=None)
@given(seed=seeds, dtype=float_types, positions=st.integers(1, 5), rank=st.integers(1, 40))
def test_products_are_those_of_the_factors(seed: int, dtype: torch.dtype, positions: int, rank: int) -> None:
    tail = Tail(8, 3, 4, rank)
    randomise(tail, seed)
    hidden = normal(seed, positions, 8).to(dtype)
    products = tail.products(hidden)
    exact, bound = exact_products(tail, hidden)
    assert products.dtype == torch.float32
    assert products.shape == (positions, 3, 4)
    assert ((products.flatten(1) - exact).abs() <= 1.01 * bound + 1e-4).all()
    experts = torch.rand(positions, 3, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1)[:, :2]
    picked = products.gather(1, experts.unsqueeze(-1).expand(-1, -1, 4))
    torch.testing.assert_close(tail.screen(hidden, experts), picked)


@pytest.mark.parametrize("kind", ["router", "tail"])
@torch.inference_mode()
def test_a_changed_bias_counts(kind: str) -> None:
    """Without gradients a copy of it is kept."""
    with torch.inference_mode(False):
        module = random_router(0, is_packed=True) if kind == "router" else Tail(16, 5, 4, 12)
        randomise(module, 1)

    def scores() -> Tensor:
        return module(hidden) if kind == "router" else module.screen(hidden, torch.arange(5).unsqueeze(0))

    hidden = normal(1, 1, 16)
    before = scores()
    torch.testing.assert_close(scores(), before)
    module.bias.add_(1.0)
    torch.testing.assert_close(scores(), before + 1)
    module.bias.zero_()
    module.to(torch.bfloat16)
    without = scores()
    module.bias = module.bias.detach() + 2.0 if kind == "tail" else torch.nn.Parameter(module.bias + 2.0)
    torch.testing.assert_close(scores(), without + 2)


# The router


def test_scores_by_hand() -> None:
    router = Router(2, 3, 1)
    router.rows.data.copy_(torch.tensor([[1, 0], [0, 1], [1, 1]]))
    router.bias.data.copy_(torch.tensor([0, 0.5, -1]))
    torch.testing.assert_close(router(HIDDEN), torch.tensor([[1, 2.5, 2], [0, -0.5, -2]]))


def test_packed_scores_by_hand() -> None:
    router = Router(2, 2, 1, is_packed=True)
    set_values(
        router,
        basis=BASIS,
        basis_scales=BASIS_SCALES,
        center=CENTER,
        codes_4bit=CODES_4BIT,
        codes_2bit=CODES_2BIT,
        level=[100, 10],
        bias=[0, 5],
    )
    expected = PRODUCTS + torch.tensor([[120.0], [-10.0]]) + torch.tensor([0.0, 5.0])
    torch.testing.assert_close(router(HIDDEN), expected, atol=ROUNDING, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, dtype=float_types, stored=float_types, positions=st.integers(0, 5), is_packed=st.booleans())
def test_scores_are_fp32(seed: int, dtype: torch.dtype, stored: torch.dtype, positions: int, is_packed: bool) -> None:
    router, hidden = random_router(seed, stored, is_packed=is_packed), normal(seed, positions, 16).to(dtype)
    scores = router(hidden)
    assert scores.shape == (positions, 5)
    assert scores.dtype == torch.float32
    # Whatever type it is kept in, it computes in fp32.
    torch.testing.assert_close(scores, router.float()(hidden.float()))


@pytest.mark.parametrize("is_packed", [False, True])
def test_an_unset_router_scores_zero(is_packed: bool) -> None:
    router = random_router(0, is_packed=is_packed)
    router.reset_parameters()
    assert router(normal(0, 2, 16)).equal(torch.zeros(2, 5))
    assert Router(16, 5, 7, is_packed)(normal(0, 2, 16)).equal(torch.zeros(2, 5))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, dtype=float_types, magnitude=st.sampled_from([0.1, 1.0, 20.0]))
def test_packed_scores_are_near(seed: int, dtype: torch.dtype, magnitude: float) -> None:
    """Of normal numbers 16 levels lose 1.2 % of the variance and 4 levels 11.7 %; a third have 16."""
    states = normal(seed, 600, 24) * magnitude + normal(seed + 1, 24)
    router, packed = packed_from(normal(seed + 2, 300, 24) / magnitude, states, 24, dtype)
    scores = packed(states)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    share = error_share(scores, router(states))
    assert 0.03 < share < 0.12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rank_above_the_hidden_size_is_allowed(dtype: torch.dtype) -> None:
    """As the default rank for small models; all directions can then have 4 bits."""
    states, rows = normal(0, 600, 24), normal(1, 300, 24)
    router, packed = packed_from(rows, states, 72, dtype)
    assert error_share(packed(states), router(states)) < 0.03
    packed.unpack()
    assert error_share(packed(states), router(states)) < 0.03


def test_the_basis_has_the_directions_of_largest_variance() -> None:
    """Errors in directions of little variance do not matter."""
    spread = torch.cat([torch.ones(6), torch.full((18,), 0.05)])
    states, rows = normal(0, 800, 24) * spread, normal(1, 200, 24)
    errors = []
    for seen in (states, states.flip(-1)):
        router, packed = packed_from(rows, seen, 9)
        errors.append(error_share(packed(states), router(states)))
    assert errors[0] < 0.15
    assert errors[1] > 3 * errors[0]


@settings(max_examples=20, deadline=None)
@given(seed=seeds, experts=st.integers(2, 60), rank=st.integers(1, 40))
def test_packed_scores_are_exact_at_the_mean_state(seed: int, experts: int, rank: int) -> None:
    """For any rank. The mean is representable in int8."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randint(-127, 128, (24,), generator=generator).float()
    mean[0] = 127
    offsets = torch.randint(-200, 200, (300, 24), generator=generator).float()
    states = torch.cat([mean + offsets, mean - offsets]) / 64
    router, packed = packed_from(normal(seed, experts, 24), states, rank)
    mean = mean.unsqueeze(0) / 64
    torch.testing.assert_close(packed(mean), router(mean), rtol=1e-2, atol=5e-2)  # to bfloat16


@settings(max_examples=20, deadline=None)
@given(seed=seeds, dtype=float_types, rank=st.integers(1, 40))
def test_unpacked_scores_are_the_packed_ones(seed: int, dtype: torch.dtype, rank: int) -> None:
    states = normal(seed, 300, 24)
    _, packed = packed_from(normal(seed + 1, 60, 24), states, rank, dtype)
    names = {name for name, _ in packed.named_parameters()}
    before = packed(states)
    with pytest.raises(ValueError, match="unpack it first"):
        packed.floats  # noqa: B018
    packed.unpack()
    assert packed.floats.dtype == dtype
    assert (names, {name for name, _ in packed.named_parameters()}) == ({"bias"}, {"rows", "bias"})
    assert error_share(packed(states), before) < 1e-3
    rows = packed.rows
    packed.unpack()  # there is nothing left to do
    assert packed.rows is rows


@settings(max_examples=20, deadline=None)
@given(seed=seeds, experts=st.integers(30, 90), rank=st.integers(1, 40))
def test_packing_twice_rounds_once(seed: int, experts: int, rank: int) -> None:
    states = normal(seed, 300, 24)
    _, packed = packed_from(normal(seed + 1, experts, 24), states, rank)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.pack()  # there is nothing to do
    assert all(tensor.equal(before[name]) for name, tensor in packed.state_dict().items())
    packed.unpack()
    packed.pack()
    assert packed.rows is None
    assert packed.state_dict().keys() == before.keys()
    for name in ("level", "bias"):
        torch.testing.assert_close(packed.state_dict()[name], before[name], rtol=1e-4, atol=1e-4)
    in_use = packed.basis.any(dim=-1)  # codes of directions that there are not say nothing
    used = packed.coordinates()[:, in_use].clone()
    packed.load_state_dict(before)
    assert used.equal(packed.coordinates()[:, in_use])


def test_repacking_keeps_the_training() -> None:
    """By least squares in the same basis; the common part of all rows is kept exactly."""
    states = normal(0, 400, 24)
    _, packed = packed_from(normal(1, 80, 24), states, 24)
    packed.unpack()
    learned = normal(2, 24) + packed.rows * 0.8
    packed.rows.data = learned.detach()
    exact = packed(states)
    packed.pack()
    assert error_share(packed(states), exact) < 0.15
    packed.unpack()
    torch.testing.assert_close(packed.rows.mean(dim=0), learned.mean(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_trained_parameters_have_gradients(is_packed: bool) -> None:
    router = random_router(0, is_packed=is_packed).requires_grad_()
    router(normal(1, 4, 16)).square().sum().backward()
    assert {name for name, _ in router.named_parameters()} == ({"bias"} if is_packed else {"rows", "bias"})
    assert all(parameter.grad.any() for parameter in router.parameters())


# The tail


def test_screen_by_hand() -> None:
    tail = Tail(2, 1, 2, 1)
    codes = {"codes_4bit": [CODES_4BIT], "codes_2bit": [CODES_2BIT]}
    scales = {"basis": BASIS, "basis_scales": BASIS_SCALES, "center": CENTER}
    set_values(tail, **codes, **scales, bias=[[0, 10]], log_prior=[[0, 0]])
    screened = tail.screen(HIDDEN, torch.zeros(2, 1, dtype=torch.long))
    torch.testing.assert_close(screened, (PRODUCTS + torch.tensor([0.0, 10.0])).unsqueeze(1), atol=ROUNDING, rtol=0)


def test_an_unset_tail_makes_tokens_of_an_expert_equally_likely() -> None:
    tail = Tail(8, 3, 4, 2)
    experts = torch.tensor([[2, 0]])
    assert tail.screen(normal(0, 1, 8), experts).equal(torch.zeros(1, 2, 4))
    torch.testing.assert_close(tail.log_prior.exp(), torch.full((3, 4), 0.25))


def test_a_tail_has_no_parameters_to_train() -> None:
    assert not list(Tail(8, 3, 4, 2).parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_always_on", [8, 4])  # the last expert is short, or full
def test_fitted_tail_is_near_the_dense_head(bias: bool, num_always_on: int) -> None:
    """The screen within each expert, and the tempered prior."""
    head, states = make_head(bias=bias, num_always_on=num_always_on, tail_rank=32), make_hidden(0, 500) * 0.4
    dense = dense_logits(head, states)
    probabilities = dense.softmax(dim=-1).mean(dim=0)
    fit_tail(head, metric_of(states), probabilities, [])
    every = torch.arange(head.num_experts).expand(len(states), -1)
    screened, exact = head.tail.screen(states, every), dense[:, head.expert_ids]
    off = screened - exact - (screened - exact).mean(dim=-1, keepdim=True)
    spread = exact - exact.mean(dim=-1, keepdim=True)
    assert off.square().mean() < 0.15 * spread.square().mean()
    at_mean = head.tail.screen(states.mean(dim=0, keepdim=True), every[:1])
    exact = dense_logits(head, states.mean(dim=0, keepdim=True))[:, head.expert_ids]
    off = at_mean - exact - (at_mean - exact).mean(dim=-1, keepdim=True)
    assert off.abs().max() < 0.02
    for ids, prior in zip(head.expert_ids, head.tail.log_prior, strict=True):
        tempered = {int(token): float(probabilities[token]) ** 0.5 for token in ids}
        expected = [tempered[int(token)] / sum(tempered.values()) for token in ids]
        torch.testing.assert_close(prior.exp(), torch.tensor(expected))


# Gradients


@pytest.mark.parametrize("kind", ["router", "tail"])
def test_gradients_are_those_of_the_products(kind: str) -> None:
    module = random_router(0, is_packed=True) if kind == "router" else Tail(16, 5, 4, 12)
    randomise(module, 1)
    every = torch.arange(5).expand(3, -1)

    def scores(hidden: Tensor) -> Tensor:
        return module(hidden) if kind == "router" else module.screen(hidden, every)

    hidden = normal(1, 3, 16).requires_grad_()
    found = scores(hidden)
    torch.testing.assert_close(found.detach(), scores(hidden.detach()), rtol=0.01, atol=0.05)  # rounded to bfloat16
    found.sum().backward()
    codes = module.coordinates().flatten(0, -2)
    slope = (codes @ module.float_basis()).sum(dim=0)
    if kind == "router":
        slope = slope + len(codes) * module.level
    torch.testing.assert_close(hidden.grad, slope.expand(3, -1), rtol=1e-2, atol=2e-2)  # scales are in bfloat16
