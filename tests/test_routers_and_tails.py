"""Routers, tails and the inner loops they share, against values worked out by hand and plain references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hf_topk import kernels, routers
from hf_topk.routers import ROUTERS, AttentionRouter, LinearRouter, LowRankRouter, MlpRouter
from hf_topk.tails import TAILS, LowRankTail, PriorTail

seeds = st.integers(0, 2**16)
float_types = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
HIDDEN = torch.tensor([[1.0, 2.0], [0.0, -1.0]])


def randomise(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dtype == torch.int8:
                tensor.random_(-127, 128, generator=generator)
            elif tensor.dtype == torch.uint8:
                tensor.random_(0, 256, generator=generator)
            else:
                tensor.normal_(generator=generator)
    return module


def set_values(module: nn.Module, **values: list) -> nn.Module:
    """Set every tensor of a module."""
    assert values.keys() == module.state_dict().keys()
    with torch.no_grad():
        for name, value in values.items():
            module.state_dict()[name].copy_(torch.tensor(value))
    return module


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Routers


@pytest.mark.parametrize("kind", ["centroid", "linear"])
def test_linear_scores_by_hand(kind: str) -> None:
    router = set_values(ROUTERS[kind](2, 3, 1), mean_rows=[[1, 0], [0, 1], [1, 1]], bias=[0, 0.5, -1])
    torch.testing.assert_close(router(HIDDEN), torch.tensor([[1, 2.5, 2], [0, -0.5, -2]]))


def test_low_rank_scores_by_hand() -> None:
    router = set_values(
        LowRankRouter(2, 2, 1), mean_rows=[[1, 0], [0, 1]], bias=[0, 0.5], down=[[2, 1]], up=[[1], [-3]]
    )
    # down h is 4 and -1.
    torch.testing.assert_close(router(HIDDEN), torch.tensor([[1 + 4, 2.5 - 12], [0 - 1, -0.5 + 3]]))


def test_mlp_scores_by_hand() -> None:
    router = set_values(
        MlpRouter(2, 2, 1), mean_rows=[[1, 0], [0, 1]], bias=[0, 0.5], down=[[1, 1]], down_bias=[-1], up=[[1], [-3]]
    )

    def gelu(x: float) -> float:
        return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))

    one, two = gelu(2), gelu(-2)
    torch.testing.assert_close(router(HIDDEN), torch.tensor([[1 + one, 2.5 - 3 * one], [two, -0.5 - 3 * two]]))


def test_attention_scores_by_hand() -> None:
    router = set_values(AttentionRouter(2, 2, 2), keys=[[[1, 0], [0, 1]], [[1, 1], [0, 0]]], bias=[[0, 0.5], [-1, 3]])
    keyed = [[(1, 2.5), (2, 3)], [(0, -0.5), (-2, 3)]]
    expected = torch.tensor([[math.log(math.exp(a) + math.exp(b)) for a, b in row] for row in keyed])
    torch.testing.assert_close(router(HIDDEN), expected)


@pytest.mark.parametrize("kind", ROUTERS)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, dtype=float_types, router_dtype=float_types, positions=st.integers(0, 5))
def test_scores_are_fp32(kind: str, seed: int, dtype: torch.dtype, router_dtype: torch.dtype, positions: int) -> None:
    router = randomise(ROUTERS[kind](8, 5, 3), seed).to(router_dtype)
    hidden = normal(seed, positions, 8).to(dtype)
    scores = router(hidden)
    assert scores.shape == (positions, 5)
    assert scores.dtype == torch.float32
    # Whatever type it is kept in, it computes in fp32.
    torch.testing.assert_close(scores, router.float()(hidden.float()))


@pytest.mark.parametrize("kind", ROUTERS)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_inward_parameters_take_up_the_scale_of_hidden_states(kind: str, seed: int, scale: float) -> None:
    router = randomise(ROUTERS[kind](8, 5, 3), seed)
    hidden = normal(seed, 4, 8)
    before = router(hidden)
    with torch.no_grad():
        for parameter in router.inward():
            parameter.div_(scale)
    torch.testing.assert_close(router(hidden * scale), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ROUTERS)
def test_untrained_router_ranks_by_mean_rows(kind: str) -> None:
    """Its correction is nothing before it is learned."""
    rows, hidden = normal(0, 5, 8), normal(1, 4, 8)
    router = ROUTERS[kind](8, 5, 3)
    with torch.no_grad():
        if isinstance(router, LinearRouter):
            router.mean_rows.copy_(rows)
        else:
            router.keys.copy_(rows.unsqueeze(1).expand(-1, 3, -1))
    expected = hidden @ rows.T + (0.0 if isinstance(router, LinearRouter) else math.log(3))
    torch.testing.assert_close(router(hidden), expected)


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != "packed_mlp"])
@settings(max_examples=25, deadline=None)
@given(seed=seeds, dtype=float_types, positions=st.integers(1, 5))
def test_int8_router_scores_nearly_the_same(kind: str, seed: int, dtype: torch.dtype, positions: int) -> None:
    router, rounded = (randomise(ROUTERS[kind](16, 5, 3), seed) for _ in range(2))
    rounded.to_int8(dtype)
    matrices = [name for name, tensor in rounded.state_dict().items() if tensor.dtype == torch.int8]
    assert matrices == [name for name, _ in router.named_parameters() if not name.endswith("bias")]
    assert all(rounded.state_dict()[f"{name}_scales"].dtype == dtype for name in matrices)
    assert [name for name, _ in rounded.named_parameters()] == [name for name in router.state_dict() if "bias" in name]
    hidden = normal(seed, positions, 16)
    scores, exact = rounded(hidden).detach(), router(hidden).detach()
    assert scores.dtype == torch.float32
    # Two roundings a product, of 1 / 254 of the largest of 16 numbers each, through two layers at most.
    torch.testing.assert_close(scores, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()) + 0.3)
    assert float((scores - exact).square().mean()) < 0.02 * float(exact.square().mean())


def packed_pair(seed: int, dtype: torch.dtype, states: torch.Tensor | None) -> tuple[MlpRouter, MlpRouter]:
    """A router of 40 dimensions and 300 experts, and the same in few bits."""
    router, packed = (randomise(ROUTERS["packed_mlp"](40, 300, 5), seed) for _ in range(2))
    packed.to_int8(dtype, states)
    return router, packed


@settings(max_examples=25, deadline=None)
@given(seed=seeds, dtype=float_types, positions=st.integers(1, 5))
def test_packed_router_scores_are_near(seed: int, dtype: torch.dtype, positions: int) -> None:
    router, packed = packed_pair(seed, dtype, None)
    assert {name for name, _ in packed.named_parameters()} == {"bias", "down_bias"}
    hidden = normal(seed, positions, 40)
    scores, exact = packed(hidden).detach(), router(hidden).detach()
    assert scores.dtype == torch.float32
    # A grid of 16 levels leaves 1.2 % of the variance of a normal variable, the int8 layers a little more.
    assert float((scores - exact).square().mean()) < 0.04 * float(exact.square().mean())


@torch.no_grad()
def test_packed_router_keeps_the_directions_that_states_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "DIRECTIONS", 8)
    states = torch.cat([normal(0, 500, 8), torch.zeros(500, 32)], dim=-1)
    errors = []
    for seen in (None, states):
        router, packed = packed_pair(1, torch.float32, seen)
        errors.append(float((packed(states) - router(states)).square().mean()))
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_router_comes_back_as_floats_of_the_same_scores(dtype: torch.dtype) -> None:
    _, packed = packed_pair(2, dtype, None)
    hidden = normal(3, 4, 40)
    scores = packed(hidden).detach()
    packed.to_float()
    assert {"mean_rows", "down", "up", "bias", "down_bias"} == {name for name, _ in packed.named_parameters()}
    torch.testing.assert_close(packed(hidden).detach(), scores, rtol=0.05, atol=0.05 * float(scores.abs().max()))


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if kind != "packed_mlp"])
def test_int8_router_of_nothing_scores_zero(kind: str) -> None:
    router = ROUTERS[kind](16, 5, 1)
    router.to_int8(torch.float32)
    router.reset_parameters()
    expected = torch.zeros(2, 5)
    torch.testing.assert_close(router(normal(0, 2, 16)), expected)


@pytest.mark.parametrize("kind", ROUTERS)
def test_learned_parameters_reach_the_scores(kind: str) -> None:
    router = randomise(ROUTERS[kind](8, 5, 3), 0)
    router(normal(1, 4, 8)).square().sum().backward()
    learned = router.trainable()
    assert bool(learned) == (kind != "centroid")
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learned)
    assert {id(parameter) for parameter in learned} <= {id(parameter) for parameter in router.parameters()}


# Tails


def test_prior_is_the_same_at_every_position() -> None:
    tail = set_values(PriorTail(2, 2, 3, 1), log_prior=[[0, -1, -2], [3, 4, 5]])
    expected = torch.tensor([[0.0, -1, -2], [3, 4, 5]])
    torch.testing.assert_close(tail(HIDDEN.bfloat16()), torch.stack([expected, expected]))


def test_low_rank_tail_by_hand() -> None:
    """Rank 1 fills a byte of two 4-bit directions and one of four 2-bit ones."""
    tail = LowRankTail(2, 1, 2, 1)
    basis = [[1, 1], [0, 1], [1, 0], [0, 0], [0, 2], [0, 0]]
    codes = {"codes_4bit": [[[3 + 16 * 15], [0]]], "codes_2bit": [[[3 + 4 * 0 + 16 * 2 + 64 * 1], [1]]]}
    set_values(tail, basis=basis, center=[1, 0, 0, 0, 0, 0], bias=[[0, 10]], **codes)
    # The projections: (2, 2) and (1, 0, 4, 0); (-2, -1) and (0, 0, -2, 0).
    first = [3 * 2 + 15 * 2 + 3 * 1 + 2 * 4, 1 + 10]
    second = [3 * -2 + 15 * -1 + 2 * -2, 10]
    torch.testing.assert_close(tail(HIDDEN), torch.tensor([[first], [second]]).float(), atol=0.2, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, dtype=float_types, positions=st.integers(1, 5), rank=st.integers(1, 40))
def test_low_rank_tail_is_the_product_of_its_factors(seed: int, dtype: torch.dtype, positions: int, rank: int) -> None:
    tail = randomise(LowRankTail(8, 3, 4, rank), seed)
    hidden = normal(seed, positions, 8).to(dtype)
    logits = tail(hidden)
    projected = hidden.float() @ tail.basis.T - tail.center
    fours = [tail.codes_4bit & 15, tail.codes_4bit >> 4]
    twos = [(tail.codes_2bit >> shift) & 3 for shift in (0, 2, 4, 6)]
    factors = torch.cat([*fours, *twos], dim=-1).float()
    assert rank <= factors.shape[-1] <= rank + 5
    exact = torch.einsum("nr,msr->nms", projected, factors) + tail.bias
    assert logits.dtype == torch.float32
    # The projection is rounded to half a step, 1 / 254 of its largest number, and each factor multiplies that.
    steps = projected.abs().amax(-1)[:, None, None] / 254 * factors.abs().sum(-1)
    assert ((logits - exact).abs() <= 1.01 * steps + 1e-3).all()


@pytest.mark.parametrize("kind", TAILS)
def test_tails_have_no_parameters_to_train(kind: str) -> None:
    tail = TAILS[kind](8, 3, 4, 2)
    assert not list(tail.parameters())
    assert tail.state_dict()


# Inner loops


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    positions=st.integers(1, 6),
    rank=st.integers(1, 70),
    rows=st.integers(1, 50),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_int8_logits_equal_reference(
    seed: int, positions: int, rank: int, rows: int, magnitude: float, dtype: torch.dtype
) -> None:
    inputs = (normal(seed, positions, rank) * magnitude).to(dtype)
    factors = torch.randint(-127, 128, (rows, rank), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    scales = normal(seed + 1, rows).to(dtype)
    fast = kernels.int8_logits(inputs, factors, scales)
    assert fast.shape == (positions, rows)
    assert fast.isfinite().all()
    assert fast.equal(kernels.int8_logits_reference(inputs, factors, scales))


def test_int8_logits_equal_reference_at_the_largest_products() -> None:
    inputs, factors = torch.ones(2, 1040), torch.full((3, 1040), 127, dtype=torch.int8)
    fast = kernels.int8_logits(inputs, factors, torch.ones(3))
    assert fast.equal(kernels.int8_logits_reference(inputs, factors, torch.ones(3)))
    torch.testing.assert_close(fast, torch.full((2, 3), 1040 * 127.0))


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    positions=st.integers(1, 6),
    width=st.integers(1, 40),
    rows=st.integers(1, 50),
    bits=st.sampled_from([1, 2, 4]),
    at_once=st.sampled_from([1, 7, 1 << 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_packed_logits_equal_reference(
    seed: int, positions: int, width: int, rows: int, bits: int, at_once: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = normal(seed, positions, width * 8 // bits).to(dtype)
    numbers = torch.randint(0, 2**bits, (rows, width * 8 // bits), generator=generator)
    codes = kernels.pack(numbers, bits)
    assert codes.shape == (rows, width)
    assert codes.dtype == torch.uint8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ROWS_UNPACKED_AT_ONCE", at_once)
        fast = kernels.packed_logits(inputs, codes, bits)
    torch.testing.assert_close(fast, kernels.packed_logits_reference(inputs, codes, bits), rtol=1e-6, atol=1e-6)
    # Half a step of rounding at most for each number.
    error = (fast - inputs.float() @ numbers.t().float()).abs()
    steps = inputs.float().abs().amax(-1, keepdim=True) / 254
    assert (error <= 1.01 * steps * numbers.sum(-1) + 1e-4).all()


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    positions=st.integers(1, 9),
    rows=st.integers(1, 60),
    vocab_size=st.integers(1, 60),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    at_once=st.sampled_from([1, 100, 1 << 24]),
)
def test_gather_dot_equals_reference(
    seed: int, positions: int, rows: int, vocab_size: int, biased: bool, dtype: torch.dtype, at_once: int
) -> None:
    hidden, weight = normal(seed, positions, 8).to(dtype), normal(seed + 1, vocab_size, 8).to(dtype)
    bias = normal(seed + 2, vocab_size).to(dtype) if biased else None
    ids = torch.randint(vocab_size, (positions, rows), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "GATHERED_ELEMENTS_AT_ONCE", at_once)
        logits = kernels.gather_dot(hidden, weight, bias, ids)
    assert_exact_logits(logits, hidden, weight, bias, ids)


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    positions=st.integers(1, 9),
    num_experts=st.integers(1, 12),
    expert_size=st.integers(1, 5),
    num_shared=st.integers(0, 4),
    biased=st.booleans(),
    compiles=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cached_bytes=st.sampled_from([0, 100, 1 << 20]),
    whole=st.sampled_from([0, 0.5, math.inf]),
    data=st.data(),
)
def test_expert_dot_equals_gather_dot(
    seed: int,
    positions: int,
    num_experts: int,
    expert_size: int,
    num_shared: int,
    biased: bool,
    compiles: bool,
    dtype: torch.dtype,
    cached_bytes: int,
    whole: float,
    data: st.DataObject,
) -> None:
    """On all its paths: one position, several that share experts, rows in blocks, and through the whole head."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = num_shared + num_experts * expert_size
    hidden, weight = normal(seed, positions, 8).to(dtype), normal(seed + 1, vocab_size, 8).to(dtype)
    bias = normal(seed + 2, vocab_size).to(dtype) if biased else None
    shared_ids, expert_ids = torch.randperm(vocab_size, generator=generator).split(
        [num_shared, vocab_size - num_shared]
    )
    expert_ids = expert_ids.view(num_experts, expert_size)
    k = data.draw(st.integers(1, num_experts))
    experts = torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in range(positions)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "CACHED_BYTES", cached_bytes)
        patch.setattr(kernels, "SHARE_WORTH_ALL_ROWS", whole)
        patch.setattr(torch.compiler, "is_compiling", lambda: compiles)
        shared, logits = kernels.expert_dot(hidden, weight, bias, shared_ids, expert_ids, experts)
    assert shared.shape == (positions, num_shared)
    assert logits.shape == (positions, k, expert_size)
    assert_exact_logits(shared, hidden, weight, bias, shared_ids.expand(positions, -1))
    assert_exact_logits(logits.flatten(1), hidden, weight, bias, expert_ids[experts].flatten(1))


def test_an_expert_that_several_positions_chose_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    shared = kernels.shared_rows_dot
    monkeypatch.setattr(kernels, "shared_rows_dot", lambda *inputs: gathered.append(len(inputs[3])) or shared(*inputs))
    shared_ids, expert_ids = torch.arange(40, 45), torch.arange(40).view(10, 4)
    experts = torch.tensor([[1, 2], [2, 1], [2, 7]])
    kernels.expert_dot(normal(0, 3, 8), normal(1, 45, 8), None, shared_ids, expert_ids, experts)
    assert gathered == [5 + 3 * 4]


def assert_exact_logits(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> None:
    expected = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double()).gather(1, ids)
    assert logits.dtype == hidden.dtype
    rounding = 1e-5 if hidden.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(logits.double(), expected, rtol=rounding, atol=4 * rounding)


@pytest.mark.parametrize("kind", [*ROUTERS, "tail"])
def test_gradients_pass_through_the_rounding(kind: str) -> None:
    module = randomise(LowRankTail(16, 5, 4, 12) if kind == "tail" else ROUTERS[kind](16, 5, 3), 0).requires_grad_(
        False
    )
    if kind != "tail":
        module.to_int8(torch.float32)
    hidden = normal(1, 3, 16).requires_grad_()
    scores = module(hidden)
    torch.testing.assert_close(scores.detach(), module(hidden.detach()), rtol=1e-5, atol=1e-4)
    scores.sum().backward()
    # Rounding is finer than a tenth: beyond it the slope is that of the numbers not rounded.
    for place in range(16):
        step = torch.zeros(3, 16)
        step[:, place] = 0.5
        slope = (module(hidden.detach() + step) - module(hidden.detach() - step)).flatten(1).sum(dim=1)
        size = 1.0 + module(hidden.detach()).flatten(1).abs().sum(dim=1)
        assert ((slope - hidden.grad[:, place]).abs() <= 0.1 * size + 0.2 * slope.abs()).all()
