"""The inner loops of the sparse head in Triton, for CUDA; the reference implementations are in `kernels.py`."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:  # Transformers requires every package that remote code imports outside a `try`.
    import triton
    import triton.language as tl
except ImportError:
    raise

ELEMENTS_GATHERED_AT_ONCE = 2048  # of rows, in one program
COLUMNS_GATHERED_AT_ONCE = 512
ROWS_UNPACKED_AT_ONCE, BYTES_UNPACKED_AT_ONCE = 32, 64  # of packed rows, in one program


def gather_dot(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """[`kernels.gather_dot`] in one launch, without a copy of the rows; sums are in fp32.

    Args:
        hidden: hidden states h, [N, d].
        weight: the head W, [V, d].
        bias: the head's bias, [V], or None.
        rows: token ids to score, [N, R] int64.

    Returns:
        Logits in the dtype of `hidden`, [N, R].
    """
    logits = torch.empty(rows.shape, dtype=hidden.dtype, device=hidden.device)
    _multiply_rows(logits, hidden, weight, rows=rows, bias=bias)
    return logits


def int8_products(inputs: Tensor, rows: Tensor, scales: Tensor, less: Tensor | None = None) -> Tensor:
    """[`kernels.int8_products`] in one launch, less a number for each row; sums are in fp32.

    Args:
        inputs: [N, r], any float dtype.
        rows: [R, r] int8.
        scales: [R], any float dtype.
        less: [R], any float dtype, or None.

    Returns:
        inputs @ rows^T * scales - less, fp32 [N, R].
    """
    products = torch.empty(len(inputs), len(rows), dtype=torch.float32, device=inputs.device)
    _multiply_rows(products, inputs, rows, rows=None, bias=None, scales=scales, less=less)
    return products


def _multiply_rows(
    products: Tensor,
    inputs: Tensor,
    matrix: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None = None,
    less: Tensor | None = None,
) -> None:
    """Fill [N, R] with products of inputs [N, d] and rows of a matrix [V, d]: each position's own, [N, R], or all."""
    num_positions, num_rows = products.shape
    columns = matrix.shape[1]
    block_columns = min(triton.next_power_of_2(columns), COLUMNS_GATHERED_AT_ONCE)
    block_rows = ELEMENTS_GATHERED_AT_ONCE // block_columns
    grid = (num_positions * triton.cdiv(num_rows, block_rows),)
    with on_device_of(inputs):
        _rows_kernel[grid](
            products,
            inputs,
            matrix,
            rows,
            bias,
            scales,
            less,
            num_rows,
            *inputs.stride(),
            *matrix.stride(),
            *((0, 0) if rows is None else rows.stride()),
            COLUMNS=columns,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
        )


@triton.jit
def _rows_kernel(
    products,
    inputs,
    matrix,
    rows,
    bias,
    scales,
    less,
    num_rows,
    inputs_stride,
    inputs_column_stride,
    matrix_stride,
    matrix_column_stride,
    rows_stride,
    rows_column_stride,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Products of one position with a block of rows."""
    position, places = own_block(num_rows, BLOCK_ROWS)
    is_row = places < num_rows
    ids = places.to(tl.int64)
    if rows is not None:
        ids = tl.load(rows + position * rows_stride + places * rows_column_stride, mask=is_row, other=0)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = columns < COLUMNS
        given = tl.load(inputs + position * inputs_stride + columns * inputs_column_stride, mask=is_column, other=0)
        some = tl.load(
            matrix + ids[:, None] * matrix_stride + columns[None, :] * matrix_column_stride,
            mask=is_row[:, None] & is_column[None, :],
            other=0,
        )
        sums += some.to(tl.float32) * given.to(tl.float32)[None, :]
    result = tl.sum(sums, axis=1)
    if scales is not None:
        result *= tl.load(scales + ids, mask=is_row, other=0).to(tl.float32)
    if less is not None:
        result -= tl.load(less + ids, mask=is_row, other=0).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + ids, mask=is_row, other=0).to(tl.float32)
    tl.store(products + position * num_rows + places, result.to(products.dtype.element_ty), mask=is_row)


def packed_products(
    inputs: Tensor, codes_4bit: Tensor, codes_2bit: Tensor, experts: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """[`kernels.packed_products`] in one launch, with a bias; codes are unpacked in registers.

    Args:
        inputs: fp32 [N, r].
        codes_4bit: [M, S, b] uint8.
        codes_2bit: [M, S, c] uint8, with r = 2 b + 4 c.
        experts: [N, k] int64, or None for all.
        bias: [M, S] or flat, any float dtype, or None.

    Returns:
        Products in steps and bias, fp32 [N, k or M, S].
    """
    num_positions, expert_size = len(inputs), codes_4bit.shape[1]
    num_picked = len(codes_4bit) if experts is None else experts.shape[1]
    num_rows = num_picked * expert_size
    products = torch.empty(num_positions, num_picked, expert_size, dtype=torch.float32, device=inputs.device)
    grid = (num_positions * triton.cdiv(num_rows, ROWS_UNPACKED_AT_ONCE),)
    with on_device_of(inputs):
        _packed_kernel[grid](
            products,
            inputs,
            codes_4bit,
            codes_2bit,
            experts,
            bias,
            num_rows,
            *inputs.stride(),
            *((0, 0) if experts is None else experts.stride()),
            SIZE=expert_size,
            BYTES_4BIT=codes_4bit.shape[-1],
            BYTES_2BIT=codes_2bit.shape[-1],
            BLOCK_ROWS=ROWS_UNPACKED_AT_ONCE,
            BLOCK_BYTES=BYTES_UNPACKED_AT_ONCE,
        )
    return products


@triton.jit
def _packed_kernel(
    products,
    inputs,
    codes_4bit,
    codes_2bit,
    experts,
    bias,
    num_rows,
    inputs_stride,
    column_stride,
    experts_stride,
    picked_stride,
    SIZE: tl.constexpr,
    BYTES_4BIT: tl.constexpr,
    BYTES_2BIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Products of one position with a block of packed rows; the rows of picked experts are consecutive."""
    position, places = own_block(num_rows, BLOCK_ROWS)
    is_row = places < num_rows
    rows = places.to(tl.int64)
    if experts is not None:
        picked = tl.load(experts + position * experts_stride + places // SIZE * picked_stride, mask=is_row, other=0)
        rows = picked * SIZE + places % SIZE
    own = inputs + position * inputs_stride
    sums = few_bits(own, column_stride, codes_4bit, rows, is_row, 4, BYTES_4BIT, BLOCK_ROWS, BLOCK_BYTES)
    own += 2 * BYTES_4BIT * column_stride
    sums += few_bits(own, column_stride, codes_2bit, rows, is_row, 2, BYTES_2BIT, BLOCK_ROWS, BLOCK_BYTES)
    if bias is not None:
        sums += tl.load(bias + rows, mask=is_row, other=0).to(tl.float32)
    tl.store(products + position * num_rows + places, sums, mask=is_row)


@triton.jit
def own_block(length, BLOCK: tl.constexpr):
    """The position of this program, and its block of places, where each position has a number of places."""
    blocks = tl.cdiv(length, BLOCK)
    position = (tl.program_id(0) // blocks).to(tl.int64)
    return position, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def few_bits(
    inputs,
    column_stride,
    codes,
    rows,
    is_row,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Products of one position with rows whose bytes hold 8 / BITS numbers each."""
    sums = tl.zeros((BLOCK_ROWS, BLOCK_BYTES), tl.float32)
    for start in range(0, ROW_BYTES, BLOCK_BYTES):
        places = start + tl.arange(0, BLOCK_BYTES)
        is_place = places < ROW_BYTES
        some = tl.load(
            codes + rows[:, None] * ROW_BYTES + places[None, :], mask=is_row[:, None] & is_place[None, :], other=0
        )
        for number in tl.static_range(8 // BITS):
            columns = number * ROW_BYTES + places
            given = tl.load(inputs + columns * column_stride, mask=is_place, other=0)
            levels = ((some >> (number * BITS)) & (2**BITS - 1)).to(tl.float32) - (2**BITS - 1) / 2
            sums += levels * given.to(tl.float32)[None, :]
    return tl.sum(sums, axis=1)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Make a tensor's device the current one, on which Triton launches; compiled code does this itself."""
    if torch.compiler.is_compiling() or not tensor.is_cuda:
        return nullcontext()
    return torch.cuda.device(tensor.device)
