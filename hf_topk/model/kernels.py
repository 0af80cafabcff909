"""The inner loops of the sparse head: exact logits of gathered rows, products of packed rows, the largest values."""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Bytes of copied rows that stay in the CPU's cache between copy and product.
CACHED_BYTES = 3 << 20
# From this share of the rows on, one product with the whole head is faster than gathering (measured on two CPU cores).
SHARE_WORTH_ALL_ROWS = 0.5
# Up to as many positions, torch's kernels for int8 and 4-bit rows are faster than products in fp32 (measured on two CPU
# cores, with and without AVX-512).
FEW_POSITIONS = 64
# The kernel for int8 needs the number of columns and the tensors' addresses to be multiples of these.
COLUMNS_OF_KERNEL, BYTES_OF_KERNEL = 16, 64
# Of the kernel for 4 bits: the processors that it is written for, numbers of columns with a scale, and rows of a block.
FAST_WITH_FOUR_BITS, COLUMNS_OF_GROUPS, ROWS_OF_BLOCK = ("AVX2", "AVX512"), (256, 128, 64, 32), 64
NARROW, WIDE = 8, 16  # columns of a product of several positions, at least
FEWEST_FOR_NUMPY = 4096  # values from which on NumPy finds the largest in less time than torch
HAS_TRITON = find_spec("triton") is not None


def gather_dot(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Exact logits of different rows of the head for each position.

    Args:
        hidden: hidden states h, [N, d].
        weight: the head W, [V, d]; only the given rows are read.
        bias: the head's bias, [V], or None.
        rows: token ids to score, [N, R] int64.

    Returns:
        Logits in the dtype of `hidden`, [N, R], accumulated in fp32 by the matrix product.
    """
    if runs_on_triton(hidden, weight, bias):
        from .triton_kernels import gather_dot as on_triton

        return on_triton(hidden, weight, bias, rows)
    if torch.compiler.is_compiling():  # fused into one loop without a copy of the rows
        logits = (F.embedding(rows, weight).float() * hidden.float().unsqueeze(1)).sum(dim=-1).to(hidden.dtype)
        return logits if bias is None else logits + bias[rows]
    if hidden.shape[0] == 1:
        return shared_rows_dot(hidden, weight, bias, rows[0])
    # On a CPU one position at a time is up to six times as fast as a batched product of copied rows.
    if hidden.is_cpu and len(hidden):
        pairs = zip(hidden.split(1), rows, strict=True)
        logits = torch.cat([_copied_rows_dot(one, weight, own_rows) for one, own_rows in pairs])
    else:
        logits = torch.bmm(F.embedding(rows, weight), hidden.unsqueeze(-1)).squeeze(-1)
    return logits if bias is None else logits + bias[rows]


def expert_dot(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shared_ids: Tensor, expert_ids: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact logits of tokens shared by all positions, and of the tokens of each position's picked experts.

    In eager mode on a CPU each expert's rows are read once, however many positions picked it. Elsewhere shapes must not
    depend on the picks, and this is [`gather_dot`].

    Args:
        hidden: hidden states h, [N, d].
        weight: the head W, [V, d].
        bias: the head's bias, [V], or None.
        shared_ids: token ids to score at every position, [A] int64.
        expert_ids: token ids of each expert, [M, S] int64.
        experts: the picked experts, [N, k] int64.

    Returns:
        Logits in the dtype of `hidden`, [N, A] and [N, k, S].
    """
    num_shared, expert_size = len(shared_ids), expert_ids.shape[1]
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        rows = torch.cat([shared_ids.expand(len(experts), -1), expert_ids[experts].flatten(1)], dim=-1)
        logits = gather_dot(hidden, weight, bias, rows)
        return logits[:, :num_shared], logits[:, num_shared:].unflatten(-1, (-1, expert_size))
    chosen, place = (experts[0], None) if len(experts) == 1 else experts.unique(return_inverse=True)
    rows = torch.cat([shared_ids, expert_ids[chosen].flatten()])
    logits = shared_rows_dot(hidden, weight, bias, rows)
    routed = logits[:, num_shared:].unflatten(-1, (-1, expert_size))
    if place is not None:
        routed = routed.gather(1, place.unsqueeze(-1).expand(-1, -1, expert_size))
    return logits[:, :num_shared], routed


def gather_dot_sharing(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, num_shared: int) -> Tensor:
    """[`gather_dot`] of rows of which the first are the same for all positions; on a CPU these are read once.

    Args:
        hidden: hidden states h, [N, d].
        weight: the head W, [V, d].
        bias: the head's bias, [V], or None.
        rows: token ids to score, [N, A + R] int64.
        num_shared: A.

    Returns:
        Logits in the dtype of `hidden`, [N, A + R].
    """
    if hidden.shape[0] <= 1 or not hidden.is_cpu:
        return gather_dot(hidden, weight, bias, rows)
    shared, own = rows.tensor_split([num_shared], dim=-1)
    parts = [shared_rows_dot(hidden, weight, bias, shared[0]), gather_dot(hidden, weight, bias, own)]
    return torch.cat(parts, dim=-1)


def shared_rows_dot(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Exact logits of rows that are the same for all positions.

    Args:
        hidden: hidden states h, [N, d].
        weight: the head W, [V, d].
        bias: the head's bias, [V], or None.
        rows: token ids to score, [R] int64.

    Returns:
        Logits in the dtype of `hidden`, [N, R].
    """
    if rows.shape[0] >= SHARE_WORTH_ALL_ROWS * weight.shape[0]:
        return F.linear(hidden, weight, bias).index_select(1, rows)
    logits = _copied_rows_dot(hidden, weight, rows)
    return logits if bias is None else logits + bias.index_select(0, rows)


def _copied_rows_dot(hidden: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """As [`shared_rows_dot`], of as many rows at a time as stay in the cache, without the bias."""
    at_once = fit_in_cache(weight.shape[1] * weight.itemsize)
    if rows.shape[0] <= at_once or torch.compiler.is_compiling():
        return _products(hidden, weight.index_select(0, rows))
    return torch.cat([_products(hidden, weight.index_select(0, some)) for some in rows.split(at_once)], dim=-1)


def _products(hidden: Tensor, rows: Tensor) -> Tensor:
    """Products with all rows: [N, d] and [R, d] to [N, R].

    For one position in bfloat16 torch leaves matrix products to oneDNN, which takes twice as long as torch's own kernel
    for a vector.
    """
    if hidden.dtype == torch.bfloat16 and hidden.shape[0] == 1 and hidden.is_cpu:
        return torch.mv(rows, hidden[0]).unsqueeze(0)
    return F.linear(hidden, rows)


def linear_in_float32(hidden: Tensor, weight: Tensor, bias: Tensor | None, fewest_columns: int) -> Tensor:
    """A linear layer with products in fp32, of as many rows at a time as stay in the cache.

    For several positions on CPUs: faster than one product, and than arithmetic in half precision where that is
    emulated. A multiple of eight positions takes no longer than fewer, and on some AMD processors MKL takes a third of
    the time for 16 that it takes for 8: zeros fill them up.

    Args:
        hidden: [N, d].
        weight: [V, d], fp32 or half precision.
        bias: [V], or None.
        fewest_columns: positions to multiply at least, a multiple of 8.

    Returns:
        Logits in the dtype of `hidden`, [N, V].
    """
    num_positions = hidden.shape[0]
    padding = max(fewest_columns - num_positions, -num_positions % NARROW)
    columns = F.pad(hidden.float(), (0, 0, 0, padding)).t().contiguous()
    logits = hidden.new_empty(num_positions, weight.shape[0])
    at_once = fit_in_cache(weight.shape[1] * columns.itemsize)
    converted = None if weight.dtype == columns.dtype else columns.new_empty(at_once, weight.shape[1])
    for some, place in zip(weight.split(at_once), logits.split(at_once, dim=1), strict=True):
        rows = some if converted is None else converted[: len(some)].copy_(some)
        place.copy_(torch.mm(rows, columns)[:, :num_positions].t())
    return logits if bias is None else logits + bias


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row, and their places, in no order: fp32 [N, n] to [N, count] each.

    Of many on a CPU by NumPy, whose quickselect is vectorised: of 16,384 values it takes a quarter of `torch.topk`'s
    time.
    """
    is_plain = values.is_cpu and not values.requires_grad and not torch.compiler.is_compiling()
    if is_plain and values.shape[1] >= FEWEST_FOR_NUMPY:
        places = torch.from_numpy(values.numpy().argpartition(-count)[:, -count:])
        return values.gather(1, places), places
    return values.topk(count, dim=-1, sorted=False)


def int8_products(inputs: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """Products with int8 rows, and a scale for each row.

    For few positions on a CPU, inputs and products are rounded to bfloat16 and every row is read once as int8. This is
    fast with and without bfloat16 or int8 instructions. Otherwise everything is in fp32.

    Args:
        inputs: [N, r], any float dtype.
        rows: [R, r] int8, or floats, which are multiplied in fp32.
        scales: [R] bfloat16, as torch's kernel needs them.

    Returns:
        inputs @ rows^T * scales, bfloat16 or fp32 [N, R].
    """
    if runs_on_triton(inputs, rows):
        from .triton_kernels import int8_products as on_triton

        return on_triton(inputs, rows, scales)
    if suits_int_kernels(inputs) and has_int8_kernel(rows):
        return int8_kernel(inputs, rows, scales)
    inputs = inputs.float()
    if torch.compiler.is_compiling():
        return _products_in_one_loop(inputs.unsqueeze(1), rows) * scales
    at_once = fit_in_cache(rows.shape[1] * inputs.itemsize)
    parts = [F.linear(inputs, some.float()) for some in rows.split(at_once)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)) * scales


def fit_in_cache(size: int) -> int:
    """How many copies of a size in bytes stay in the CPU's cache, at least one."""
    return max(1, CACHED_BYTES // max(1, size))


def suits_int_kernels(inputs: Tensor) -> bool:
    """Whether torch's kernels for int8 and 4-bit rows support these inputs and are fast for as many."""
    needs_gradient = torch.is_grad_enabled() and inputs.requires_grad
    return inputs.is_cpu and inputs.shape[0] <= FEW_POSITIONS and not needs_gradient


def has_int8_kernel(rows: Tensor) -> bool:
    """Whether torch's kernel for int8 rows supports these; with others it is wrong or crashes (torch 2.13)."""
    fits = rows.dtype == torch.int8 and rows.shape[1] % COLUMNS_OF_KERNEL == 0 and rows.is_contiguous()
    # Loaded weights can be at any offset of a memory-mapped file. Compiled code gets prepared rows, which are aligned.
    return fits and (torch.compiler.is_compiling() or rows.data_ptr() % BYTES_OF_KERNEL == 0)


def int8_kernel(inputs: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """Products by torch's kernel, bfloat16 [N, R]; arguments as in [`int8_products`]."""
    return torch._weight_int8pack_mm(_for_kernel(inputs), rows, scales)


def int4_kernel(inputs: Tensor, words: Tensor, columns: int, scales_and_zeros: Tensor) -> Tensor:
    """Products by torch's kernel for 4 bits, bfloat16 [N, R]; arguments as in [`FourBitRows`]."""
    return torch._weight_int4pack_mm_for_cpu(_for_kernel(inputs), words, columns, scales_and_zeros)


def _for_kernel(inputs: Tensor) -> Tensor:
    rounded = inputs.bfloat16().contiguous()
    if not torch.compiler.is_compiling() and rounded.data_ptr() % BYTES_OF_KERNEL:
        rounded = rounded.clone()
    return rounded


class FourBitRows(NamedTuple):
    """Rows of odd integers from -15 to 15 in the layout of torch's kernel for 4 bits, which this CPU determines.

    Attributes:
        words: the packed rows.
        scales_and_zeros: of each group of columns, bfloat16 [groups, R, 2].
        columns: of a group.
        num_rows: R without rows of padding.
    """

    words: Tensor
    scales_and_zeros: Tensor
    columns: int
    num_rows: int


def four_bit_rows(rows: Tensor) -> FourBitRows | None:
    """Pack odd integers from -15 to 15, [R, r] int8; None where torch has no fast kernel for them."""
    columns = next((columns for columns in COLUMNS_OF_GROUPS if rows.shape[1] % columns == 0), None)
    if columns is None or not rows.is_cpu or torch.backends.cpu.get_cpu_capability() not in FAST_WITH_FOUR_BITS:
        return None
    padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % ROWS_OF_BLOCK))
    words = torch._convert_weight_to_int4pack_for_cpu(((padded + 15) >> 1).int(), 1)
    # The value of a code is then 2 (code - 8) + 1.
    scales_and_zeros = torch.tensor([2.0, 1.0], dtype=torch.bfloat16)
    groups = padded.shape[1] // columns
    return FourBitRows(words, scales_and_zeros.repeat(groups, padded.shape[0], 1), columns, rows.shape[0])


def four_bit_products(inputs: Tensor, rows: FourBitRows) -> Tensor:
    """Products by torch's kernel, with inputs and products rounded: [N, r] to bfloat16 [N, R]."""
    return int4_kernel(inputs, rows.words, rows.columns, rows.scales_and_zeros)[:, : rows.num_rows]


def expert_int8_products(inputs: Tensor, rows: Tensor, experts: Tensor, scales: Tensor) -> Tensor:
    """[`int8_products`] with the rows of the experts that each position picked.

    Args:
        inputs: [N, r], any float dtype.
        rows: [M, S, r] int8, or the same as int32, [M, S, r / 4], which is copied faster; or floats.
        experts: the picked experts, [N, k] int64.
        scales: at least M S equal values, bfloat16.

    Returns:
        inputs @ rows^T * scales, bfloat16 or fp32 [N, k, S].
    """
    expert_size, dtype = rows.shape[1], torch.int8 if rows.dtype == torch.int32 else rows.dtype
    if torch.compiler.is_compiling() and len(inputs) > 1:
        return _products_in_one_loop(inputs.unsqueeze(1).unsqueeze(1), rows.view(dtype)[experts]) * scales[:expert_size]
    # Each expert is read once, however many positions picked it.
    chosen, place = (experts[0], None) if experts.shape[0] == 1 else experts.unique(return_inverse=True)
    picked = rows.index_select(0, chosen).view(dtype).flatten(0, 1)
    products = int8_products(inputs, picked, scales[: picked.shape[0]]).unflatten(-1, (-1, expert_size))
    return products if place is None else products.gather(1, place.unsqueeze(-1).expand(-1, -1, expert_size))


def packed_products(inputs: Tensor, codes_4bit: Tensor, codes_2bit: Tensor, experts: Tensor | None) -> Tensor:
    """Products with packed rows, for devices that unpack as fast as they read.

    Args:
        inputs: fp32 [N, r].
        codes_4bit: of the first directions, [M, S, b] uint8.
        codes_2bit: of the others, [M, S, c] uint8, with r = 2 b + 4 c.
        experts: the picked experts, [N, k] int64, or None for all.

    Returns:
        Products with the values of the codes, in steps: fp32 [N, k or M, S].
    """
    if runs_on_triton(inputs, codes_4bit):
        from .triton_kernels import packed_products as on_triton

        return on_triton(inputs, codes_4bit.contiguous(), codes_2bit.contiguous(), experts)
    products = inputs @ (unpack_halves(codes_4bit, codes_2bit).flatten(0, 1).float() / 2).t()
    products = products.unflatten(-1, codes_4bit.shape[:2])
    return products if experts is None else products.gather(1, experts.unsqueeze(-1).expand(-1, -1, products.shape[-1]))


def unpack_halves(codes_4bit: Tensor, codes_2bit: Tensor) -> Tensor:
    """The values of codes in half steps, which are odd integers: uint8 [..., b] and [..., c] to int8 [..., r]."""
    codes = ((codes_4bit, 4), (codes_2bit, 2))
    return torch.cat([2 * unpack(some, bits) - (2**bits - 1) for some, bits in codes], dim=-1)


def _products_in_one_loop(inputs: Tensor, rows: Tensor) -> Tensor:
    """Sums of products over the last dimension, in fp32, which the compiler fuses without a copy of the rows."""
    return (rows.float() * inputs.float()).sum(dim=-1)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Pack integers from 0 to 2^bits - 1: [R, r] to uint8 [R, r bits / 8].

    The lowest bits of a row's bytes hold its first columns, the next bits the columns that follow.
    """
    planes = numbers.to(torch.uint8).unflatten(-1, (8 // bits, -1))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=numbers.device)
    return (planes << shifts.unsqueeze(-1)).sum(dim=-2, dtype=torch.uint8)


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Unpack what [`pack`] packed: uint8 [..., r bits / 8] to int8 [..., r]."""
    return torch.cat([_plane(codes, bits, place) for place in range(8 // bits)], dim=-1)


def _plane(codes: Tensor, bits: int, place: int) -> Tensor:
    """The numbers at one place in every byte, int8 of the shape of `codes`."""
    return ((codes >> (place * bits)) & (2**bits - 1)).view(torch.int8)


def runs_on_triton(inputs: Tensor, *others: Tensor | None) -> bool:
    """Whether the Triton kernels support these; they have no gradients."""
    if not (HAS_TRITON and inputs.is_cuda):
        return False
    given = [inputs, *(some for some in others if some is not None)]
    needs_gradient = torch.is_grad_enabled() and any(some.requires_grad for some in given)
    return all(some.is_cuda for some in given) and not needs_gradient
