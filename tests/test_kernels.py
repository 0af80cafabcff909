"""The inner loops of the sparse head against plain references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_topk import kernels

seeds = st.integers(0, 2**16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("positions", [1, 5])
def test_product_of_picked_experts(bits: int, positions: int) -> None:
    """In eager mode, where each expert is read once, and compiled."""
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, 2**bits, (7, 3, 16), generator=generator)
    codes = kernels.pack(numbers.flatten(0, 1), bits).unflatten(0, (7, 3))
    experts = torch.randint(0, 7, (positions, 4), generator=generator)
    inputs = torch.randn(positions, 16, generator=generator)
    every = kernels.packed_logits_reference(inputs, codes.flatten(0, 1), bits).unflatten(-1, (7, 3))
    expected = every.gather(1, experts.unsqueeze(-1).expand(-1, -1, 3))
    torch.testing.assert_close(kernels.expert_packed_logits(inputs, codes, bits, experts), expected)
    compiled = torch.compile(kernels.expert_packed_logits, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs, codes, bits, experts), expected)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, bits=st.sampled_from([1, 2, 4]), rows=st.integers(1, 9), width=st.integers(1, 9))
def test_unpacking_gives_what_was_packed(seed: int, bits: int, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2**bits, (rows, width * 8 // bits), generator=generator)
    assert kernels.unpack(kernels.pack(numbers, bits), bits).equal(numbers.to(torch.int8))
