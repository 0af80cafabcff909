"""The inner loops of the sparse head, as plain torch: exact logits of gathered rows, and products of few bits."""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of gathered rows held at once; beyond it positions are worked off in turns.
GATHERED_ELEMENTS_AT_ONCE = 1 << 24
# Bytes of gathered rows that stay in the processor's cache between their copy and their product.
CACHED_BYTES = 3 << 20
# From this share of the rows on, one product with the whole head is faster than gathering (seen on two CPU cores).
SHARE_WORTH_ALL_ROWS = 0.5
ROWS_UNPACKED_AT_ONCE = 1 << 16  # as many as stay in the processor's cache
HAS_TRITON = find_spec("triton") is not None


def gather_dot(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Exact logits of chosen rows of the head, each position with rows of its own.

    Args:
        hidden: hidden states h, [N, d].
        weight: the head W, [V, d]; only the chosen rows are read.
        bias: the head's bias, [V], or None.
        rows: token ids to score, [N, R] int64.

    Returns:
        Logits in the type of `hidden`, [N, R], accumulated in fp32 by the matrix product.
    """
    if _runs_on_triton(hidden, weight, bias):
        from .triton_kernels import gather_dot as on_triton

        return on_triton(hidden, weight, bias, rows)
    if torch.compiler.is_compiling():  # one loop, in which no row is copied
        logits = (F.embedding(rows, weight).float() * hidden.float().unsqueeze(1)).sum(dim=-1).to(hidden.dtype)
        return logits if bias is None else logits + bias[rows]
    at_once = max(1, GATHERED_ELEMENTS_AT_ONCE // (rows.shape[1] * hidden.shape[1]))
    logits = torch.cat(
        [
            torch.bmm(F.embedding(some_rows, weight), some_hidden.unsqueeze(-1)).squeeze(-1)
            for some_hidden, some_rows in zip(hidden.split(at_once), rows.split(at_once), strict=True)
        ]
    )
    return logits if bias is None else logits + bias[rows]


def expert_dot(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shared_ids: Tensor, expert_ids: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact logits of some tokens at every position, and of the tokens of experts that each position chose.

    In eager mode on a CPU each expert's rows are read once, however many positions chose it; elsewhere, where shapes
    must not depend on what was chosen, this is [`gather_dot`].

    Args:
        hidden: hidden states h, [N, d].
        weight: the head W, [V, d].
        bias: the head's bias, [V], or None.
        shared_ids: token ids to score at every position, [A] int64.
        expert_ids: token ids of each expert, [M, S] int64.
        experts: the chosen experts, [N, k] int64.

    Returns:
        Logits in the type of `hidden`, [N, A] and [N, k, S].
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


def shared_rows_dot(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Exact logits of rows that are the same for all positions.

    Args:
        hidden: hidden states h, [N, d].
        weight: the head W, [V, d].
        bias: the head's bias, [V], or None.
        rows: token ids to score, [R] int64.

    Returns:
        Logits in the type of `hidden`, [N, R].
    """
    if rows.shape[0] >= SHARE_WORTH_ALL_ROWS * weight.shape[0]:
        return F.linear(hidden, weight, bias).index_select(1, rows)
    at_once = rows.shape[0] if torch.compiler.is_compiling() else max(1, CACHED_BYTES // weight[:1].nbytes)
    parts = [F.linear(hidden, weight.index_select(0, some)) for some in rows.split(max(1, at_once))]
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return logits if bias is None else logits + bias.index_select(0, rows)


def int8_logits(inputs: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
    """Product with an int8 matrix whose rows have a scale each; the inputs are rounded to int8 as well.

    The integer product is exact, so this equals [`int8_logits_reference`] bit for bit up to 1040 columns.

    Args:
        inputs: [N, r], any float type.
        factors: [R, r] int8.
        scales: [R], any float type.

    Returns:
        inputs @ (factors * scales)^T up to the rounding of the inputs, fp32 [N, R].
    """
    if _runs_on_triton(inputs):
        from .triton_kernels import int8_logits as on_triton

        return on_triton(inputs, factors, scales)
    if not _multiplies_int8(inputs, factors):
        return int8_logits_reference(inputs, factors, scales)
    rounded, input_scales = _round_to_int8(inputs)
    return torch._int_mm(rounded, factors.t()).float().mul_(scales).mul_(input_scales)


def int8_logits_reference(inputs: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
    """What [`int8_logits`] computes, in floating point: products of int8 are exact in fp32 up to rank 1040."""
    rounded, input_scales = _round_through(inputs)
    return F.linear(rounded, factors.float()) * scales.float() * input_scales


def packed_logits(inputs: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Product with a matrix of small whole numbers, several of them in a byte; inputs are rounded to int8.

    The lowest bits of all bytes of a row hold its first columns, the next ones the columns that follow. The integer
    products are exact, so this equals [`packed_logits_reference`] up to the rounding of their sum.

    Args:
        inputs: [N, r], any float type; r is a multiple of 8 / bits.
        codes: [R, r bits / 8] uint8.
        bits: bits of a number, 1, 2 or 4.

    Returns:
        inputs @ numbers^T up to the rounding of the inputs, fp32 [N, R], with numbers from 0 to 2^bits - 1.
    """
    if _runs_on_triton(inputs):
        from .triton_kernels import packed_logits as on_triton

        return on_triton(inputs, codes, bits)
    if not _multiplies_int8(inputs, codes):
        return packed_logits_reference(inputs, codes, bits)
    rounded, input_scales = _round_to_int8(inputs)
    parts = rounded.split(codes.shape[-1], dim=-1)
    products = [_packed_product(parts, some, bits) for some in codes.split(ROWS_UNPACKED_AT_ONCE)]
    return torch.cat(products, dim=-1) * input_scales


def _packed_product(parts: tuple[Tensor, ...], codes: Tensor, bits: int) -> Tensor:
    """Sum of the products of each part of the inputs with its place in the bytes: int8 [N, ...] each to fp32 [N, R]."""
    last = len(parts) - 1
    total = torch._int_mm(parts[last], (codes >> (last * bits)).view(torch.int8).t()).float()
    for place, part in enumerate(parts[:last]):
        # Numbers stay where they are in the byte, which is not yet the sign's place; their product is scaled instead.
        numbers = (codes & ((2**bits - 1) << (place * bits))).view(torch.int8)
        total.add_(torch._int_mm(part, numbers.t()), alpha=2.0 ** (-place * bits))
    return total


def expert_packed_logits(inputs: Tensor, codes: Tensor, bits: int, experts: Tensor) -> Tensor:
    """[`packed_logits`] with the rows of the experts that each position picked.

    Args:
        inputs: [N, r], any float type.
        codes: [M, S, r bits / 8] uint8.
        bits: bits of a number, 1, 2 or 4.
        experts: the picked experts, [N, k] int64.

    Returns:
        inputs @ numbers^T up to the rounding of the inputs, fp32 [N, k, S].
    """
    if inputs.device.type == "cpu" and not torch.compiler.is_compiling():  # each expert is read once for all positions
        chosen, place = (experts[0], None) if len(experts) == 1 else experts.unique(return_inverse=True)
        logits = packed_logits(inputs, codes.index_select(0, chosen).flatten(0, 1), bits).unflatten(
            -1, (-1, codes.shape[1])
        )
        return logits if place is None else logits.gather(1, place.unsqueeze(-1).expand(-1, -1, codes.shape[1]))
    rounded, input_scales = _round_through(inputs)
    numbers = unpack(codes[experts].flatten(1, 2), bits).float()  # (N, k S, r)
    logits = torch.bmm(numbers, rounded.unsqueeze(-1)).squeeze(-1) * input_scales
    return logits.unflatten(-1, (-1, codes.shape[1]))


def packed_logits_reference(inputs: Tensor, codes: Tensor, bits: int) -> Tensor:
    """What [`packed_logits`] computes, with all numbers unpacked at once and in floating point."""
    rounded, input_scales = _round_through(inputs)
    return F.linear(rounded, unpack(codes, bits).float()) * input_scales


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Pack whole numbers from 0 to 2^bits - 1 as [`packed_logits`] has them: [R, r] to uint8 [R, r bits / 8]."""
    planes = numbers.to(torch.uint8).unflatten(-1, (8 // bits, -1))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=numbers.device)
    return (planes << shifts.unsqueeze(-1)).sum(dim=-2, dtype=torch.uint8)


def unpack(codes: Tensor, bits: int) -> Tensor:
    """Unpack what [`pack`] packed: uint8 [..., r bits / 8] to int8 [..., r]."""
    return torch.cat([_plane(codes, bits, place) for place in range(8 // bits)], dim=-1)


def _plane(codes: Tensor, bits: int, place: int) -> Tensor:
    """The numbers in one place of every byte, int8 of the shape of `codes`."""
    return ((codes >> (place * bits)) & (2**bits - 1)).view(torch.int8)


def _runs_on_triton(*inputs: Tensor | None) -> bool:
    # No gradient goes through a kernel.
    given = [some for some in inputs if some is not None]
    needs_gradient = torch.is_grad_enabled() and any(some.requires_grad for some in given)
    return HAS_TRITON and all(some.is_cuda for some in given) and not needs_gradient


def _multiplies_int8(inputs: Tensor, matrix: Tensor) -> bool:
    # The integer product has size limits on other devices, on the CPU it is wrong at rank 1 (seen in torch 2.13), and
    # it has no gradient.
    needs_gradient = torch.is_grad_enabled() and inputs.requires_grad
    return inputs.device.type == "cpu" and matrix.shape[-1] > 1 and not needs_gradient


def _round_to_int8(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in 127 steps of its largest magnitude, int8 [N, r], and what a step is worth, fp32 [N, 1]."""
    steps, scales = _steps(inputs)
    return steps.round_().to(torch.int8), scales


def _round_through(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers as floats whose gradient is that of the inputs not rounded (straight-through)."""
    steps, scales = _steps(inputs)
    return steps + (steps.round() - steps).detach(), scales


def _steps(inputs: Tensor) -> tuple[Tensor, Tensor]:
    inputs = inputs.float()
    largest = torch.linalg.vector_norm(inputs.detach(), ord=torch.inf, dim=-1, keepdim=True)
    scales = largest.clamp_min_(torch.finfo(torch.float32).tiny).div_(127.0)
    return inputs / scales, scales
