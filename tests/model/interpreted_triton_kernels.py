"""The Triton kernels against their plain references, in Triton's interpreter.

`test_triton_kernels.py` runs this file in a process of its own: where Triton was imported without its interpreter it
cannot be had any more, and where it was imported with it nothing else could use Triton.
"""

import pytest
import torch
from support.heads import make_head
from torch import Tensor

from hf_topk import TopKExpertsHead
from hf_topk.model import kernels, triton_head, triton_kernels

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


def test_gather_dot_reads_strided_tensors() -> None:
    hidden, weight = normal(0, 40, 3).t(), normal(1, 40, 9).t()
    rows = torch.tensor([8, 0, 8, 3]).expand(3, -1)
    torch.testing.assert_close(triton_kernels.gather_dot(hidden, weight, None, rows), (hidden @ weight.t())[:, rows[0]])


# Products of few bits


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize(("positions", "columns", "num_rows"), [(1, 1, 2), (3, 20, 130), (33, 300, 17), (1, 1030, 3)])
def test_int8_products(dtype: torch.dtype, positions: int, columns: int, num_rows: int) -> None:
    inputs = normal(0, positions, columns).to(dtype)
    rows, scales = whole(2, -127, 128, num_rows, columns).to(torch.int8), normal(1, num_rows).to(dtype)
    exact = inputs.double() @ rows.double().t() * scales.double()
    found = triton_kernels.int8_products(inputs, rows, scales)
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-2)


def test_products_with_a_number_for_each_row() -> None:
    inputs, rows = normal(0, 2, 12), whole(1, -127, 128, 5, 12).to(torch.int8)
    scales, less, bias = normal(2, 5), normal(3, 5), normal(4, 5)
    found = triton_kernels.int8_products(inputs, rows, scales, less)
    torch.testing.assert_close(found, kernels.int8_products(inputs, rows, scales) - less, rtol=1e-5, atol=1e-3)
    codes = [whole(5, 0, 256, 5, 1, 2).to(torch.uint8) for _ in range(2)]
    found = triton_kernels.packed_products(inputs, *codes, None, bias)
    expected = kernels.packed_products(inputs, *codes, None) + bias.unsqueeze(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("is_picked", [False, True])
@pytest.mark.parametrize(
    ("positions", "experts", "size", "bytes_4bit", "bytes_2bit"),
    [(1, 3, 1, 1, 1), (3, 9, 16, 48, 48), (33, 5, 7, 70, 3)],
)
def test_packed_products(
    is_picked: bool, positions: int, experts: int, size: int, bytes_4bit: int, bytes_2bit: int
) -> None:
    inputs = normal(0, positions, 2 * bytes_4bit + 4 * bytes_2bit)
    codes = [whole(width, 0, 256, experts, size, width).to(torch.uint8) for width in (bytes_4bit, bytes_2bit)]
    picked = whole(1, 0, experts, positions, 4) if is_picked else None
    products = triton_kernels.packed_products(inputs, *codes, picked)
    torch.testing.assert_close(products, kernels.packed_products(inputs, *codes, picked), rtol=1e-5, atol=1e-3)


def test_products_read_strided_inputs() -> None:
    inputs, codes = normal(0, 24, 3).t()[:, 8:14], [whole(1, 0, 256, 4, 5, 1).to(torch.uint8) for _ in range(2)]
    picked = whole(1, 0, 4, 2, 3).t()
    expected = kernels.packed_products(inputs, *codes, picked)
    torch.testing.assert_close(triton_kernels.packed_products(inputs, *codes, picked), expected, rtol=1e-5, atol=1e-4)
    rows, scales = whole(2, -127, 128, 6, 9).to(torch.int8).t(), normal(3, 9)
    expected = inputs @ rows.float().t() * scales
    torch.testing.assert_close(triton_kernels.int8_products(inputs, rows, scales), expected, rtol=1e-5, atol=1e-3)


def test_no_positions_give_nothing() -> None:
    weight, rows = normal(0, 9, 4), torch.empty(0, 3, dtype=torch.long)
    assert triton_kernels.gather_dot(torch.empty(0, 4), weight, None, rows).shape == (0, 3)
    assert triton_kernels.int8_products(torch.empty(0, 4), weight.to(torch.int8), torch.ones(9)).shape == (0, 9)
    codes = torch.zeros(9, 2, 1, dtype=torch.uint8)
    assert triton_kernels.packed_products(torch.empty(0, 6), codes, codes, None).shape == (0, 9, 2)


# The head


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small heads take several blocks."""
    for name, size in (("VALUES_OF_PART", 64), ("IDS_AT_ONCE", 16), ("EXPERTS_SCATTERED_AT_ONCE", 4)):
        monkeypatch.setattr(triton_head, name, size)


@pytest.mark.parametrize("count", [1, 7, 40, 300])
def test_largest(count: int, small_blocks: None) -> None:
    values = normal(0, 4, 300)
    values[1].round_()  # some are equal
    values[2, 5:] = -torch.inf
    values[3] = 1.0
    found, places = triton_head.largest(values, count)
    assert found.equal(values.gather(1, places))
    assert places.sort().values.equal(values.sort(stable=True, descending=True).indices[:, :count].sort().values)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_rescored": 20, "num_experts_per_tok": 3},
        {"num_always_on": 0, "expert_size": 10, "num_experts": 10, "num_experts_per_tok": 4, "num_rescored": 30},
        {"num_always_on": 9, "expert_size": 7, "num_experts": 13, "num_experts_per_tok": 12, "num_rescored": 1},
        # Of the last expert four tokens are left, so R may exceed the tokens of the picked experts.
        {"num_always_on": 6, "expert_size": 45, "num_experts": 3, "num_experts_per_tok": 1, "num_rescored": 44},
    ],
)
def test_head(
    sizes: dict[str, int], positions: int, dtype: torch.dtype, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain steps, with products in fp32."""
    monkeypatch.setattr(kernels, "FEW_POSITIONS", 0)
    head, hidden = filled(make_head(bias=dtype == torch.float32, **sizes)).to(dtype), normal(6, positions, 32).to(dtype)
    assert head.screens
    plain, found = head.score(hidden), triton_head.score(head, hidden)
    assert found.experts.sort().values.equal(plain.experts.sort().values)
    assert found.ids.sort().values.equal(plain.ids.sort().values)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(found.offset, plain.offset, **close)
    torch.testing.assert_close(triton_head.logits_of(head, found), head.logits_of(plain), **close)


def filled(head: TopKExpertsHead) -> TopKExpertsHead:
    """A head with random numbers in its packed router and its tail."""
    head.router.pack()
    for rows in (head.router, head.tail):
        rows.basis.copy_(whole(1, -127, 128, *rows.basis.shape))
        rows.basis_scales.fill_(2**-8)
        for codes in (rows.codes_4bit, rows.codes_2bit):
            codes.copy_(whole(2, 0, 256, *codes.shape))
        rows.center.copy_(normal(3, *rows.center.shape).bfloat16())  # as `set_basis` rounds it
        rows.bias.copy_(normal(4, *rows.bias.shape))
    tail = head.tail
    tail.log_prior.copy_(normal(5, *tail.log_prior.shape).log_softmax(dim=-1))
    repeats = head.expert_ids == head.expert_ids[:, :1]
    for values in (tail.codes_4bit, tail.codes_2bit, tail.bias, tail.log_prior):
        values[repeats] = values[:, :1].expand_as(values)[repeats]
    return head
