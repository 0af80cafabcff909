"""The sparse head with a screen and a packed router in Triton, for CUDA: a dozen launches that wait for nothing.

The plain reference of each step is in `head.py`. Shapes depend on the settings alone, so a CUDA graph can capture it
all. Rows that several positions pick are read from memory once, and then from the GPU's cache.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from . import kernels
from .scored import Scored
from .triton_kernels import few_bits, int8_products, on_device_of, own_block, packed_products

if TYPE_CHECKING:
    from .head import TopKExpertsHead
    from .packed_rows import PackedRows

try:  # Transformers requires every package that remote code imports outside a `try`.
    import triton
    import triton.language as tl
except ImportError:
    raise

MOST_VALUES, VALUES_OF_PART = 1 << 15, 1 << 12  # one program finds the largest of so many; places are written by part
VALUES_A_WARP, MOST_WARPS = 512, 32
TOKENS_SCREENED_AT_ONCE, BYTES_UNPACKED_AT_ONCE = 64, 64  # in one program; an expert has at most so many tokens
IDS_AT_ONCE, EXPERTS_SCATTERED_AT_ONCE = 128, 16


def score(head: "TopKExpertsHead", hidden: Tensor) -> Scored:
    """[`TopKExpertsHead.score`] of a head with a screen and a packed router: route, screen, compute exact logits.

    Args:
        head: the sparse head.
        hidden: hidden states, [N, d].
    """
    router, inputs = head.router, _projected(head.router, hidden)
    first, others = router.codes_4bit.unsqueeze(1), router.codes_2bit.unsqueeze(1)
    scores = packed_products(inputs, first, others, None, router.bias).squeeze(-1)
    expert_scores, experts = largest(scores, head.num_experts_per_tok)
    screened, estimates = _screened(head, _projected(head.tail, hidden), experts, expert_scores)
    kept, places = largest(estimates, head.num_rescored)
    ids = _ids(head, experts, places)
    exact = head.exact_logits(hidden, ids)
    return Scored(exact, ids, experts, scores, expert_scores, _offset(exact, kept), screened, places, kept)


def _projected(rows: "PackedRows", hidden: Tensor) -> Tensor:
    """Coordinates of hidden states, fp32 [N, r]."""
    return int8_products(hidden, rows.basis, rows.basis_scales, rows.center)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[`kernels.largest`] in one launch, by bisection over the bits of the values; of very many by torch.

    Args:
        values: fp32 [N, n].
        count: how many to find; of equal values the first.

    Returns:
        The largest values and their places, int64, [N, count] each.
    """
    if values.shape[1] > MOST_VALUES:
        return kernels.largest(values, count)
    values = values.contiguous()
    found = values.new_empty(len(values), count)
    places = torch.empty_like(found, dtype=torch.long)
    block = triton.next_power_of_2(values.shape[1])
    with on_device_of(values):
        _largest_kernel[(len(values),)](
            found,
            places,
            values,
            values.shape[1],
            COUNT=count,
            BLOCK=block,
            PART=min(block, VALUES_OF_PART),
            num_warps=min(MOST_WARPS, max(1, block // VALUES_A_WARP)),
        )
    return found, places


@triton.jit
def _largest_kernel(found, places, values, num_values, COUNT: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr):
    """The largest values of one position: the smallest of them by bisection, then the places of all, part by part."""
    position = tl.program_id(0).to(tl.int64)
    own = values + position * num_values
    keys, is_value = _keys(own, tl.arange(0, BLOCK), num_values)
    low, high = tl.full((), -(2**31), tl.int64), tl.full((), 2**31, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        are_enough = tl.sum((is_value & (keys >= middle.to(tl.int32))).to(tl.int32), axis=0) >= COUNT
        low, high = tl.where(are_enough, middle, low), tl.where(are_enough, high, middle)
    smallest = low.to(tl.int32)
    num_above = tl.sum((is_value & (keys > smallest)).to(tl.int32), axis=0)
    above, equal = position * COUNT, position * COUNT + num_above  # where the next ones go
    end = (position + 1) * COUNT
    for start in range(0, num_values, PART):
        columns = start + tl.arange(0, PART)
        some, is_there = _keys(own, columns, num_values)
        is_above, is_equal = is_there & (some > smallest), is_there & (some == smallest)
        counts = tl.cumsum(tl.where(is_above, 1 << 16, is_equal.to(tl.int32)), axis=0)
        place = tl.where(is_above, above + (counts >> 16), equal + (counts & 0xFFFF)) - 1
        is_found = is_above | (is_equal & (place < end))
        tl.store(found + place, tl.load(own + columns, mask=is_found), mask=is_found)
        tl.store(places + place, columns.to(tl.int64), mask=is_found)
        above += tl.sum(is_above.to(tl.int32), axis=0)
        equal += tl.sum(is_equal.to(tl.int32), axis=0)


@triton.jit
def _keys(values, columns, num_values):
    """Integers in the order of some fp32 values, and which of them exist."""
    is_value = columns < num_values
    bits = tl.load(values + columns, mask=is_value, other=0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), is_value


def _screened(head: "TopKExpertsHead", inputs: Tensor, experts: Tensor, expert_scores: Tensor) -> tuple[Tensor, Tensor]:
    """The screen's log p(v | e, h) of the picked experts' tokens, fp32 [N, k, S], and estimates, fp32 [N, k S]."""
    tail, (num_positions, num_picked), size = head.tail, experts.shape, head.expert_size
    screened = torch.empty(num_positions, num_picked, size, dtype=torch.float32, device=inputs.device)
    estimates = torch.empty_like(screened).flatten(1)
    block_size = triton.next_power_of_2(size)
    block_experts = TOKENS_SCREENED_AT_ONCE // block_size
    grid = (num_positions * triton.cdiv(num_picked, block_experts),)
    with on_device_of(inputs):
        _screen_kernel[grid](
            screened,
            estimates,
            inputs,
            tail.codes_4bit,
            tail.codes_2bit,
            tail.bias,
            head.expert_ids if head.has_short_experts else None,
            experts,
            expert_scores,
            num_picked,
            inputs.stride(0),
            SIZE=size,
            BLOCK_SIZE=block_size,
            BYTES_4BIT=tail.codes_4bit.shape[-1],
            BYTES_2BIT=tail.codes_2bit.shape[-1],
            BLOCK_EXPERTS=block_experts,
            BLOCK_BYTES=BYTES_UNPACKED_AT_ONCE,
        )
    return screened, estimates


@triton.jit
def _screen_kernel(
    screened,
    estimates,
    inputs,
    codes_4bit,
    codes_2bit,
    bias,
    expert_ids,
    experts,
    expert_scores,
    num_picked,
    inputs_stride,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BYTES_4BIT: tl.constexpr,
    BYTES_2BIT: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """The tokens of a block of one position's picked experts; ids are given if some repeat, and these get no mass."""
    BLOCK_ROWS: tl.constexpr = BLOCK_EXPERTS * BLOCK_SIZE
    position, number = own_block(num_picked * BLOCK_SIZE, BLOCK_ROWS)
    picked, within = number // BLOCK_SIZE, number % BLOCK_SIZE
    is_row = (picked < num_picked) & (within < SIZE)
    expert = tl.load(experts + position * num_picked + picked, mask=is_row, other=0)
    rows = expert * SIZE + within
    own = inputs + position * inputs_stride
    logits = tl.load(bias + rows, mask=is_row, other=0).to(tl.float32)
    logits += few_bits(own, 1, codes_4bit, rows, is_row, 4, BYTES_4BIT, BLOCK_ROWS, BLOCK_BYTES)
    own += 2 * BYTES_4BIT
    logits += few_bits(own, 1, codes_2bit, rows, is_row, 2, BYTES_2BIT, BLOCK_ROWS, BLOCK_BYTES)
    is_counted = is_row
    if expert_ids is not None:
        _, is_counted = _ids_of(expert_ids, expert, within, is_row, SIZE)
    # The first token of each expert is counted, of those beyond the last one, too, as logarithms of 0 are no numbers.
    counted = tl.where(is_counted | (within == 0), logits, -float("inf"))
    counted = tl.reshape(counted, (BLOCK_EXPERTS, BLOCK_SIZE))
    most = tl.max(counted, axis=1)
    total = most + tl.log(tl.sum(tl.exp(counted - most[:, None]), axis=1))
    logits -= tl.reshape(tl.broadcast_to(total[:, None], (BLOCK_EXPERTS, BLOCK_SIZE)), (BLOCK_ROWS,))
    scores = tl.load(expert_scores + position * num_picked + picked, mask=is_row, other=0)
    places = (position * num_picked + picked) * SIZE + within
    tl.store(screened + places, logits, mask=is_row)
    tl.store(estimates + places, tl.where(is_counted, logits + scores, -float("inf")), mask=is_row)


def _ids(head: "TopKExpertsHead", experts: Tensor, places: Tensor) -> Tensor:
    """Ids of the always-on tokens and of those at places among the picked experts' tokens: [N, R] to [N, A + R]."""
    (num_positions, num_kept), num_always_on = places.shape, head.num_always_on
    ids = torch.empty(num_positions, num_always_on + num_kept, dtype=torch.long, device=places.device)
    blocks = triton.cdiv(ids.shape[1], IDS_AT_ONCE)
    with on_device_of(places):
        _ids_kernel[(num_positions * blocks,)](
            ids,
            head.always_on_ids,
            head.expert_ids,
            experts,
            places,
            num_always_on,
            num_kept,
            experts.shape[1],
            SIZE=head.expert_size,
            BLOCK=IDS_AT_ONCE,
        )
    return ids


@triton.jit
def _ids_kernel(
    ids,
    always_on_ids,
    expert_ids,
    experts,
    places,
    num_always_on,
    num_kept,
    num_picked,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one position's token ids."""
    num_ids = num_always_on + num_kept
    position, number = own_block(num_ids, BLOCK)
    is_always_on, is_kept = number < num_always_on, (number >= num_always_on) & (number < num_ids)
    place = tl.load(places + position * num_kept + number - num_always_on, mask=is_kept, other=0)
    expert = tl.load(experts + position * num_picked + place // SIZE, mask=is_kept, other=0)
    found = tl.load(expert_ids + expert * SIZE + place % SIZE, mask=is_kept, other=0)
    found = tl.where(is_kept, found, tl.load(always_on_ids + number, mask=is_always_on, other=0))
    tl.store(ids + position * num_ids + number, found, mask=number < num_ids)


def _offset(exact: Tensor, kept: Tensor) -> Tensor:
    """[`scored.mass_over`] of the R tokens without repeated ids, in one launch: [N, A + R] and [N, R] to [N, 1]."""
    offset = kept.new_empty(len(kept), 1)
    num_always_on, block = exact.shape[1] - kept.shape[1], triton.next_power_of_2(kept.shape[1])
    with on_device_of(exact):
        _offset_kernel[(len(kept),)](offset, exact, kept, num_always_on, kept.shape[1], BLOCK=block)
    return offset


@triton.jit
def _offset_kernel(offset, exact, kept, num_always_on, num_kept, BLOCK: tl.constexpr):
    """Log of the mass of one position's exact logits over that of their estimates."""
    position = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    estimates = tl.load(kept + position * num_kept + columns, mask=columns < num_kept, other=-float("inf"))
    is_kept = estimates > -float("inf")
    places = position * (num_always_on + num_kept) + num_always_on + columns
    logits = tl.load(exact + places, mask=is_kept, other=-float("inf")).to(tl.float32)
    most, most_estimated = tl.max(logits, axis=0), tl.max(estimates, axis=0)
    mass, estimated = tl.sum(tl.exp(logits - most), axis=0), tl.sum(tl.exp(estimates - most_estimated), axis=0)
    tl.store(offset + position, most + tl.log(mass) - most_estimated - tl.log(estimated))


def logits_of(head: "TopKExpertsHead", scored: Scored) -> Tensor:
    """[`TopKExpertsHead.logits_of`] of results of [`score`], in three launches, without `later_bias`: [N, V]."""
    logits = scored.exact.new_empty(len(scored.exact), head.out_features)
    _scatter(logits, head, head.tail.log_prior, scored.scores, scored.offset, None)
    _scatter(logits, head, cast(Tensor, scored.screened), scored.masses, scored.offset, scored.experts)
    return logits.scatter_(1, scored.ids, scored.exact)


def _scatter(
    logits: Tensor, head: "TopKExpertsHead", within: Tensor, masses: Tensor, offset: Tensor, experts: Tensor | None
) -> None:
    """Write log p(v | e) + log mass of e + offset to the places of the tokens of some experts, or of all."""
    num_positions, num_experts = masses.shape
    grid = (num_positions * triton.cdiv(num_experts, EXPERTS_SCATTERED_AT_ONCE),)
    with on_device_of(logits):
        _scatter_kernel[grid](
            logits,
            head.expert_ids,
            within,
            masses,
            offset,
            experts,
            num_experts,
            logits.shape[1],
            SIZE=head.expert_size,
            BLOCK_SIZE=triton.next_power_of_2(head.expert_size),
            BLOCK_EXPERTS=EXPERTS_SCATTERED_AT_ONCE,
        )


@triton.jit
def _scatter_kernel(
    logits,
    expert_ids,
    within,
    masses,
    offset,
    experts,
    num_experts,
    num_tokens,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """The tokens of a block of one position's experts; of repeated ids the first."""
    position, number = own_block(num_experts * BLOCK_SIZE, BLOCK_EXPERTS * BLOCK_SIZE)
    place, column = number // BLOCK_SIZE, number % BLOCK_SIZE
    is_row = (place < num_experts) & (column < SIZE)
    expert, shares = place.to(tl.int64), place.to(tl.int64)
    if experts is not None:
        expert = tl.load(experts + position * num_experts + place, mask=is_row, other=0)
        shares += position * num_experts
    ids, is_row = _ids_of(expert_ids, expert, column, is_row, SIZE)
    values = tl.load(within + shares * SIZE + column, mask=is_row, other=0).to(tl.float32)
    values += tl.load(masses + position * num_experts + place, mask=is_row, other=0) + tl.load(offset + position)
    tl.store(logits + position * num_tokens + ids, values.to(logits.dtype.element_ty), mask=is_row)


@triton.jit
def _ids_of(expert_ids, expert, column, is_row, SIZE: tl.constexpr):
    """Token ids at columns of experts, and which of these do not repeat the first one."""
    ids = tl.load(expert_ids + expert * SIZE + column, mask=is_row, other=0)
    first = tl.load(expert_ids + expert * SIZE, mask=is_row, other=0)
    return ids, is_row & ((column == 0) | (ids != first))
