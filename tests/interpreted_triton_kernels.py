"""The Triton kernels against their plain references, in Triton's interpreter.

`test_triton_kernels.py` runs this file in a process of its own: where Triton was imported without its interpreter it
cannot be had any more, and where it was imported with it nothing else could use Triton.
"""

import pytest
import torch
from torch import Tensor

from hf_topk import kernels, triton_kernels

FLOAT_TYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(seed: int, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


# Gather-dot


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("positions", "columns", "num_rows"), [(1, 7, 300), (3, 64, 33), (33, 600, 1), (1, 1024, 5)])
def test_gather_dot(dtype: torch.dtype, has_bias: bool, positions: int, columns: int, num_rows: int) -> None:
    hidden, weight = normal(0, positions, columns).to(dtype), normal(1, 97, columns).to(dtype)
    bias = normal(2, 97).to(dtype) if has_bias else None
    rows = whole(3, 0, 97, positions, num_rows)  # some are repeated
    logits = triton_kernels.gather_dot(hidden, weight, bias, rows)
    exact = kernels.gather_dot(hidden.double(), weight.double(), None if bias is None else bias.double(), rows)
    one_step = torch.finfo(dtype).eps
    torch.testing.assert_close(logits, exact.to(dtype), rtol=one_step, atol=1e-4)


def test_gather_dot_sums_in_fp32() -> None:
    """Sums in bfloat16 stop growing at 256."""
    rows = torch.zeros(1, 3, dtype=torch.long)
    logits = triton_kernels.gather_dot(torch.ones(1, 1024).bfloat16(), torch.ones(4, 1024).bfloat16(), None, rows)
    assert logits.tolist() == [[1024.0] * 3]


def test_gather_dot_reads_tensors_where_they_lie() -> None:
    hidden, weight = normal(0, 40, 3).t(), normal(1, 40, 9).t()
    rows = torch.tensor([8, 0, 8, 3]).expand(3, -1)
    torch.testing.assert_close(triton_kernels.gather_dot(hidden, weight, None, rows), (hidden @ weight.t())[:, rows[0]])


# Products of few bits


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("positions", "columns", "num_rows"), [(1, 1, 2), (3, 20, 130), (33, 300, 17)])
def test_int8_logits(dtype: torch.dtype, positions: int, columns: int, num_rows: int) -> None:
    inputs, scales = normal(0, positions, columns).to(dtype), normal(1, num_rows).to(dtype)
    factors = whole(2, -127, 128, num_rows, columns).to(torch.int8)
    logits = triton_kernels.int8_logits(inputs, factors, scales)
    torch.testing.assert_close(logits, kernels.int8_logits_reference(inputs, factors, scales), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("positions", "row_bytes", "num_rows"), [(1, 1, 2), (3, 16, 130), (33, 300, 17)])
def test_packed_logits(bits: int, dtype: torch.dtype, positions: int, row_bytes: int, num_rows: int) -> None:
    inputs = normal(0, positions, row_bytes * 8 // bits).to(dtype)
    codes = whole(1, 0, 256, num_rows, row_bytes).to(torch.uint8)
    logits = triton_kernels.packed_logits(inputs, codes, bits)
    torch.testing.assert_close(logits, kernels.packed_logits_reference(inputs, codes, bits), rtol=1e-6, atol=0)


def test_integer_products_are_exact() -> None:
    """Beyond 2^24 sums in fp32 lose the last one."""
    inputs, factors = torch.ones(1, 1041), torch.full((1, 1041), 127, dtype=torch.int8)
    factors[0, 0] = 126
    logits = triton_kernels.int8_logits(inputs, factors, torch.ones(1))
    assert logits.item() == torch.tensor(127 * (127 * 1041 - 1)).float() * (torch.ones(()) / 127)


def test_halves_are_rounded_to_the_even_number() -> None:
    inputs = torch.tensor([[127.0, 0.5, 1.5, -2.5, -0.5, 126.5]])
    for place in range(6):
        factors = torch.zeros(1, 6, dtype=torch.int8)
        factors[0, place] = 1
        assert triton_kernels.int8_logits(inputs, factors, torch.ones(1)).item() == inputs[0, place].round()


def test_products_with_zeros_are_zero() -> None:
    inputs, codes = torch.zeros(2, 8), whole(0, 0, 256, 5, 4).to(torch.uint8)
    assert not triton_kernels.packed_logits(inputs, codes, 4).any()
    assert not triton_kernels.int8_logits(inputs, torch.ones(5, 8, dtype=torch.int8), torch.ones(5)).any()


def test_products_read_tensors_where_they_lie() -> None:
    """The tail gives each of its parts some columns of one projection."""
    inputs, codes = normal(0, 3, 24)[:, 8:16], whole(1, 0, 256, 4, 5).to(torch.uint8).t()
    expected = kernels.packed_logits_reference(inputs, codes, 4)
    torch.testing.assert_close(triton_kernels.packed_logits(inputs, codes, 4), expected)


def test_no_positions_give_no_logits() -> None:
    weight, rows = normal(0, 9, 4), torch.empty(0, 3, dtype=torch.long)
    assert triton_kernels.gather_dot(torch.empty(0, 4), weight, None, rows).shape == (0, 3)
    assert triton_kernels.int8_logits(torch.empty(0, 4), weight.to(torch.int8), torch.ones(9)).shape == (0, 9)
