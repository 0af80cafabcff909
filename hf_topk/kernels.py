"""The two inner loops of the sparse head, as plain torch: exact logits of gathered rows, and int8 tail logits."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Elements of gathered rows held at once; beyond it positions are worked off in turns.
GATHERED_ELEMENTS_AT_ONCE = 1 << 24
# From so many gathered rows a row of the head on, one product with the whole head is faster (seen on two CPU cores).
ROWS_GATHERED_PER_ROW_OF_HEAD = 2


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
    if rows.numel() >= ROWS_GATHERED_PER_ROW_OF_HEAD * weight.shape[0]:  # reading the whole head is less work
        return F.linear(hidden, weight, bias).gather(1, rows)
    if hidden.shape[0] == 1:  # a batched product is slow for one position
        chosen = weight.index_select(0, rows[0])
        return F.linear(hidden, chosen, None if bias is None else bias.index_select(0, rows[0]))
    at_once = max(1, GATHERED_ELEMENTS_AT_ONCE // (rows.shape[1] * hidden.shape[1]))
    logits = torch.cat(
        [
            torch.bmm(F.embedding(some_rows, weight), some_hidden.unsqueeze(-1)).squeeze(-1)
            for some_hidden, some_rows in zip(hidden.split(at_once), rows.split(at_once), strict=True)
        ]
    )
    return logits if bias is None else logits + bias[rows]


def int8_logits(inputs: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
    """Product with an int8 matrix whose rows have a scale each; the inputs are rounded to int8 as well.

    The integer product is exact, so this equals [`int8_logits_reference`] bit for bit.

    Args:
        inputs: [N, r], any float type.
        factors: [R, r] int8.
        scales: [R], any float type.

    Returns:
        inputs @ (factors * scales)^T up to the rounding of the inputs, fp32 [N, R].
    """
    # The integer product has size limits on other devices, and on the CPU it is wrong at rank 1 (seen in torch 2.13).
    if inputs.device.type != "cpu" or inputs.shape[-1] == 1:
        return int8_logits_reference(inputs, factors, scales)
    rounded, input_scales = _round_to_int8(inputs)
    products = torch._int_mm(rounded, factors.t())
    return products.float() * scales.float() * input_scales


def int8_logits_reference(inputs: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
    """What [`int8_logits`] computes, in floating point: products of int8 are exact in fp32 up to rank 1040."""
    rounded, input_scales = _round_to_int8(inputs)
    return F.linear(rounded.float(), factors.float()) * scales.float() * input_scales


def _round_to_int8(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 127 steps of its largest magnitude: int8 [N, r] and fp32 scales [N, 1]."""
    inputs = inputs.float()
    scales = inputs.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
    return (inputs / scales).round().to(torch.int8), scales
