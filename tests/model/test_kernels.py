"""The kernels of the sparse head, against plain references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_topk.model import kernels

seeds = st.integers(0, 2**16)
ONES = torch.ones(100, dtype=torch.bfloat16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int8_rows(seed: int, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def assert_products(found: Tensor, inputs: Tensor, rows: Tensor) -> None:
    """Check products up to the rounding of bfloat16 for few positions, else of fp32."""
    expected = inputs.double() @ rows.double().t()
    loss = 2.0**-7 if len(inputs) <= kernels.FEW_POSITIONS else 2.0**-18
    most = inputs.double().abs() @ rows.double().abs().t()
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= loss * (most + expected.abs()) + 1e-30).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    positions=st.sampled_from([0, 1, 5, 64, 65]),
    rank=st.sampled_from([1, 7, 16, 24, 48, 64, 70]),
    num_rows=st.integers(1, 50),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cached_bytes=st.sampled_from([1000, 1 << 20]),
)
def test_int8_products(
    seed: int, positions: int, rank: int, num_rows: int, magnitude: float, dtype: torch.dtype, cached_bytes: int
) -> None:
    inputs, rows = (normal(seed, positions, rank) * magnitude).to(dtype), int8_rows(seed, num_rows, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "CACHED_BYTES", cached_bytes)
        assert_products(kernels.int8_products(inputs, rows, ONES[: len(rows)]), inputs, rows)


def moved(tensor: Tensor, by: int) -> Tensor:
    """A copy at an unaligned address."""
    size = tensor.element_size()
    room = torch.empty(tensor.numel() + 128 // size, dtype=tensor.dtype)
    start = (-room.data_ptr() % 64 + by) // size
    room[start : start + tensor.numel()] = tensor.flatten()
    return room[start : start + tensor.numel()].view_as(tensor)


@pytest.mark.parametrize("by", [0, 2, 8, 24, 32, 48])
@pytest.mark.parametrize("positions", [1, 2, 3, 4])
def test_int8_products_of_unaligned_tensors(positions: int, by: int) -> None:
    """As in memory-mapped files, with which torch's kernel would crash, and in views."""
    inputs, rows = normal(0, positions, 64).bfloat16(), int8_rows(1, 33, 64)
    for some, others in ((moved(inputs, by), rows), (inputs, moved(rows, by)), (inputs.t().contiguous().t(), rows)):
        assert_products(kernels.int8_products(some, others, ONES[:33]), inputs, rows)
    assert_products(kernels.int8_products(inputs, rows.t().contiguous().t(), ONES[:33]), inputs, rows)


@pytest.mark.parametrize("columns", [32, 96, 384, 512])
@pytest.mark.parametrize("num_rows", [1, 64, 130])
@pytest.mark.parametrize("positions", [1, 5])
def test_four_bit_products(positions: int, num_rows: int, columns: int) -> None:
    """In eager mode, also of a view, and compiled."""
    rows = 2 * torch.randint(-8, 8, (num_rows, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8) + 1
    packed, inputs = kernels.four_bit_rows(rows), normal(1, positions, columns)
    if torch.backends.cpu.get_cpu_capability() not in kernels.FAST_WITH_FOUR_BITS:
        assert packed is None
        return
    assert packed is not None
    assert packed.words.nbytes < num_rows * columns / 2 + 64 * columns
    for some in (inputs, inputs.bfloat16(), moved(inputs.bfloat16(), 2)):
        assert_products(kernels.four_bit_products(some, packed), some, rows)
    torch.compiler.reset()  # torch limits recompilations of a function
    compiled = torch.compile(kernels.four_bit_products, fullgraph=True, backend="eager")
    assert compiled(inputs, packed).equal(kernels.four_bit_products(inputs, packed))


def test_no_four_bit_rows_of_other_numbers_of_columns() -> None:
    assert kernels.four_bit_rows(int8_rows(0, 5, 48)) is None


@pytest.mark.parametrize("positions", [1, 5, 12])
def test_int8_products_of_picked_experts(positions: int) -> None:
    """In eager mode, which reads each expert once, and compiled."""
    inputs, rows = normal(0, positions, 16), int8_rows(1, 7, 3, 16)
    experts = torch.randint(0, 7, (positions, 4), generator=torch.Generator().manual_seed(2))
    found = kernels.expert_int8_products(inputs, rows, experts, ONES)
    for position, picked in enumerate(experts):
        assert_products(found[position].flatten()[None], inputs[position : position + 1], rows[picked].flatten(0, 1))
    compiled = torch.compile(kernels.expert_int8_products, fullgraph=True, backend="eager")(inputs, rows, experts, ONES)
    for position, picked in enumerate(experts):
        assert_products(compiled[position].flatten()[None], inputs[position : position + 1], rows[picked].flatten(0, 1))


def test_int8_products_have_the_gradient_of_their_inputs() -> None:
    inputs, rows = normal(0, 2, 16).requires_grad_(), int8_rows(1, 9, 16)
    kernels.int8_products(inputs, rows, ONES[: len(rows)]).sum().backward()
    torch.testing.assert_close(inputs.grad, rows.float().sum(dim=0).expand(2, -1))


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    positions=st.integers(1, 9),
    rows=st.integers(1, 60),
    vocab_size=st.integers(1, 60),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cached_bytes=st.sampled_from([1, 1000, 1 << 20]),
)
def test_gather_dot_equals_reference(
    seed: int, positions: int, rows: int, vocab_size: int, biased: bool, dtype: torch.dtype, cached_bytes: int
) -> None:
    hidden, weight = normal(seed, positions, 8).to(dtype), normal(seed + 1, vocab_size, 8).to(dtype)
    bias = normal(seed + 2, vocab_size).to(dtype) if biased else None
    ids = torch.randint(vocab_size, (positions, rows), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "CACHED_BYTES", cached_bytes)
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
    """On all its paths: one position, positions that share experts, blocks of rows, and the whole head."""
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


def test_an_expert_picked_at_several_positions_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
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


@settings(max_examples=40, deadline=None)
@given(seed=seeds, bits=st.sampled_from([1, 2, 4]), rows=st.integers(1, 9), width=st.integers(1, 9))
def test_unpacking_restores_packed_numbers(seed: int, bits: int, rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2**bits, (rows, width * 8 // bits), generator=generator)
    assert kernels.unpack(kernels.pack(numbers, bits), bits).equal(numbers.to(torch.int8))


@settings(max_examples=50, deadline=None)
@given(
    values=st.integers(1, 3),
    length=st.integers(1, 40) | st.integers(kernels.FEWEST_FOR_NUMPY - 1, 5000),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_largest_values(values: int, length: int, seed: int, data: st.DataObject) -> None:
    rows = torch.randint(-5, 5, (values, length), generator=torch.Generator().manual_seed(seed)).float()
    rows[rows == -5] = -torch.inf
    count = data.draw(st.integers(1, length))
    found, places = kernels.largest(rows, count)
    assert rows.gather(1, places).equal(found)
    assert all(len(set(row)) == count for row in places.tolist())
    assert found.sort(descending=True).values.equal(rows.topk(count).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 37, 100])
@pytest.mark.parametrize(
    ("num_positions", "fewest", "columns"), [(5, 8, 8), (5, 16, 16), (8, 8, 8), (9, 8, 16), (17, 16, 24), (24, 16, 24)]
)
def test_linear_in_float32(
    num_positions: int,
    fewest: int,
    columns: int,
    num_rows: int,
    bias: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In parts that do not fill up."""
    monkeypatch.setattr(kernels, "CACHED_BYTES", 10 * 16 * 4)
    multiplied, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda rows, others: multiplied.append(others.shape[1]) or mm(rows, others))
    hidden, weight = torch.randn(num_positions, 16, dtype=dtype), torch.randn(num_rows, 16, dtype=dtype)
    added = torch.randn(num_rows, dtype=dtype) if bias else None
    expected = F.linear(hidden.float(), weight.float()).to(dtype)
    found = kernels.linear_in_float32(hidden, weight, added, fewest)
    assert multiplied == [columns] * -(-num_rows // 10)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected if added is None else expected + added)
