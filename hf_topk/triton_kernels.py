"""The inner loops of the sparse head on CUDA, in Triton; their plain references are in `kernels.py`."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:  # Transformers asks those who load code from the Hub for all packages that are imported outside of a `try`.
    import triton
    import triton.language as tl
except ImportError:
    raise

ELEMENTS_GATHERED_AT_ONCE = 2048  # of rows, in one program
COLUMNS_GATHERED_AT_ONCE = 512
BYTES_MULTIPLIED_AT_ONCE = 4096  # of a matrix of few bits, in one program
BYTES_OF_A_ROW_AT_ONCE = 256
FEW_POSITIONS, POSITIONS_AT_ONCE = 16, 32  # tensor cores take no fewer positions
FEWEST_BYTES = 32  # of a row, in a product of int8 on tensor cores


def gather_dot(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """What [`kernels.gather_dot`] computes, with every row read where it lies: one launch, sums in fp32.

    Args:
        hidden: hidden states h, [N, d].
        weight: the head W, [V, d].
        bias: the head's bias, [V], or None.
        rows: token ids to score, [N, R] int64.

    Returns:
        Logits in the type of `hidden`, [N, R].
    """
    num_positions, num_rows = rows.shape
    columns = weight.shape[1]
    logits = torch.empty(num_positions, num_rows, dtype=hidden.dtype, device=hidden.device)
    block_columns = min(triton.next_power_of_2(columns), COLUMNS_GATHERED_AT_ONCE)
    block_rows = ELEMENTS_GATHERED_AT_ONCE // block_columns
    grid = (num_positions * triton.cdiv(num_rows, block_rows),)
    with _on_device_of(hidden):
        _gather_dot_kernel[grid](
            logits,
            hidden,
            weight,
            bias,
            rows,
            num_rows,
            *hidden.stride(),
            *weight.stride(),
            *rows.stride(),
            COLUMNS=columns,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
        )
    return logits


@triton.jit
def _gather_dot_kernel(
    logits,
    hidden,
    weight,
    bias,
    rows,
    num_rows,
    hidden_stride,
    hidden_column_stride,
    weight_stride,
    weight_column_stride,
    rows_stride,
    rows_column_stride,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Some rows of one position."""
    blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    position = (tl.program_id(0) // blocks).to(tl.int64)
    places = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = places < num_rows
    ids = tl.load(rows + position * rows_stride + places * rows_column_stride, mask=is_row, other=0)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, COLUMNS, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        is_column = columns < COLUMNS
        state = tl.load(hidden + position * hidden_stride + columns * hidden_column_stride, mask=is_column, other=0)
        chosen = tl.load(
            weight + ids[:, None] * weight_stride + columns[None, :] * weight_column_stride,
            mask=is_row[:, None] & is_column[None, :],
            other=0,
        )
        sums += chosen.to(tl.float32) * state.to(tl.float32)[None, :]
    result = tl.sum(sums, axis=1)
    if bias is not None:
        result += tl.load(bias + ids, mask=is_row, other=0).to(tl.float32)
    tl.store(logits + position * num_rows + places, result.to(logits.dtype.element_ty), mask=is_row)


def int8_logits(inputs: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
    """What [`kernels.int8_logits`] computes, in two launches: the inputs are rounded, then multiplied.

    Args:
        inputs: [N, r], any float type.
        factors: [R, r] int8.
        scales: [R], any float type.

    Returns:
        inputs @ (factors * scales)^T up to the rounding of the inputs, fp32 [N, R].
    """
    return _product(inputs, factors, scales, 8)


def packed_logits(inputs: Tensor, codes: Tensor, bits: int) -> Tensor:
    """What [`kernels.packed_logits`] computes, in two launches; the numbers are unpacked on the chip alone.

    Args:
        inputs: [N, r], any float type; r is a multiple of 8 / bits.
        codes: [R, r bits / 8] uint8.
        bits: bits of a number, 1, 2 or 4.

    Returns:
        inputs @ numbers^T up to the rounding of the inputs, fp32 [N, R], with numbers from 0 to 2^bits - 1.
    """
    return _product(inputs, codes, None, bits)


def _product(inputs: Tensor, matrix: Tensor, scales: Tensor | None, bits: int) -> Tensor:
    num_positions, columns = inputs.shape
    num_rows, row_bytes = matrix.shape
    rounded = torch.empty(num_positions, columns, dtype=torch.int8, device=inputs.device)
    input_scales = torch.empty(num_positions, dtype=torch.float32, device=inputs.device)
    logits = torch.empty(num_positions, num_rows, dtype=torch.float32, device=inputs.device)
    block_bytes = max(FEWEST_BYTES, min(triton.next_power_of_2(row_bytes), BYTES_OF_A_ROW_AT_ONCE))
    block_rows = BYTES_MULTIPLIED_AT_ONCE // block_bytes
    block_positions = FEW_POSITIONS if num_positions <= FEW_POSITIONS else POSITIONS_AT_ONCE
    grid = (triton.cdiv(num_positions, block_positions) * triton.cdiv(num_rows, block_rows),)
    with _on_device_of(inputs):
        _round_kernel[(num_positions,)](
            rounded, input_scales, inputs, *inputs.stride(), COLUMNS=columns, BLOCK=triton.next_power_of_2(columns)
        )
        _product_kernel[grid](
            logits,
            rounded,
            input_scales,
            matrix,
            scales,
            num_positions,
            num_rows,
            *matrix.stride(),
            BITS=bits,
            ROW_BYTES=row_bytes,
            BLOCK_POSITIONS=block_positions,
            BLOCK_ROWS=block_rows,
            BLOCK_BYTES=block_bytes,
        )
    return logits


@triton.jit
def _round_kernel(rounded, scales, inputs, stride, column_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """One position, to 127 steps of its largest magnitude."""
    position = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < COLUMNS
    values = tl.load(inputs + position * stride + columns * column_stride, mask=is_column, other=0).to(tl.float32)
    # Below 1e-30 the reference goes on; this does not, since a device may take the smallest numbers for zero.
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=0), 1e-30), 127.0)
    steps = tl.div_rn(values, scale + tl.zeros_like(values))
    # At 1.5 * 2^23 floats are whole numbers: halves go to the even one, as in torch.
    whole = (steps + 12582912.0) - 12582912.0
    tl.store(rounded + position * COLUMNS + columns, whole.to(tl.int8), mask=is_column)
    tl.store(scales + position, scale)


@triton.jit
def _product_kernel(
    logits,
    rounded,
    input_scales,
    matrix,
    scales,
    num_positions,
    num_rows,
    matrix_stride,
    matrix_column_stride,
    BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Some positions with some rows, whose bytes hold 8 / BITS numbers each; sums in int32."""
    NUMBERS: tl.constexpr = 8 // BITS
    blocks = tl.cdiv(num_positions, BLOCK_POSITIONS)
    positions = tl.program_id(0) % blocks * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    rows = tl.program_id(0) // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_position, is_row = positions < num_positions, rows < num_rows
    first_inputs = rounded + positions.to(tl.int64)[:, None] * (NUMBERS * ROW_BYTES)
    first_codes = matrix + rows.to(tl.int64)[None, :] * matrix_stride
    sums = tl.zeros((BLOCK_POSITIONS, BLOCK_ROWS), tl.int32)
    for start in range(0, ROW_BYTES, BLOCK_BYTES):
        places = start + tl.arange(0, BLOCK_BYTES)
        is_place = places < ROW_BYTES
        codes = tl.load(
            first_codes + places[:, None] * matrix_column_stride, mask=is_place[:, None] & is_row[None, :], other=0
        )
        for number in tl.static_range(NUMBERS):
            part = tl.load(
                first_inputs + (number * ROW_BYTES + places)[None, :],
                mask=is_position[:, None] & is_place[None, :],
                other=0,
            )
            numbers = codes if BITS == 8 else ((codes >> (number * BITS)) & (2**BITS - 1)).to(tl.int8)
            sums = tl.dot(part, numbers, acc=sums, out_dtype=tl.int32)
    result = sums.to(tl.float32)
    if scales is not None:
        result *= tl.load(scales + rows, mask=is_row, other=0).to(tl.float32)[None, :]
    result *= tl.load(input_scales + positions, mask=is_position, other=0)[:, None]
    places_of_logits = logits + positions.to(tl.int64)[:, None] * num_rows + rows[None, :]
    tl.store(places_of_logits, result, mask=is_position[:, None] & is_row[None, :])


def _on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    # Triton launches on the current device, wherever the tensors are; compiled code sees to that itself.
    if torch.compiler.is_compiling() or not tensor.is_cuda:
        return nullcontext()
    return torch.cuda.device(tensor.device)
