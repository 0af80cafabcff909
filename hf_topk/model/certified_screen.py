"""A certified screen: the dense head's likeliest tokens by an int8 copy of its rows, with a proof.

For a row w and a hidden state h the Cauchy-Schwarz inequality bounds what quantising both to w' and h' costs:

    |<w, h> - <w', h'>| <= ||w - w'|| ||h'|| + ||w|| ||h - h'||

The tokens whose logit could be the largest by that bound, a handful, get exact logits. vLLM's `ScreenedGreedyHead` does
the same with a copy in FP8 on GPUs. On CPUs products of int8 are several times as fast as those of a block of positions
in float32 or emulated bfloat16, and read half of the bytes or a quarter.
"""

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from .crossover import MOST_POSITIONS, is_faster
from .head import TopKExpertsHead
from .kernels import NARROW, WIDE, fit_in_cache, linear_in_float32

LARGEST_WEIGHT = 127
# FBGEMM's kernel for processors without int8 instructions adds two products in 16 bits, so that hidden states have
# seven bits: here two digits of [-63, 63], of which the first counts 64 times as much.
LARGEST_DIGIT, BASE = 63, 64
# Functions of torch, which deprecates them.
QUANTISE, PACK = "_make_per_channel_quantized_tensor", "linear_prepack"
MULTIPLY = "linear_with_input_q_dq_qweight_dq_output_fp32"
ZERO = 64  # the kernel's code of a digit of 0
POSITIONS_AT_ONCE = 24  # as many as the longest block has, so that each block reads the copy once
FEWEST_MEASURED, MOST_MEASURED = 8, 32  # positions for which it is measured whether the screen is faster
ROWS_OF_PART = 1 << 15  # of the copy; packing fewer at once is faster, and products of one part tell those of all
MOST_CANDIDATES = 1 / 64  # of the tokens at a position; with more the dense head is faster
SMALLEST = 1e-30  # for rows and states of zeros


@dataclass(frozen=True)
class CertifiedScreen:
    """An int8 copy of rows, and what it differs from them by.

    Attributes:
        weight: the rows W, [V, d].
        parts: their int8 copy in the kernel's layout, some rows at a time.
        sums: of each row, see [`_row_sums`], [V]; they show whether the rows have changed.
        errors: ||w - w'|| of each row, and what products in fp32 may round, fp32 [V].
        norms: ||w|| of each row, fp32 [V].
        largest_error: the largest of `errors`.
        largest_norm: the largest of `norms`.
    """

    weight: Tensor
    parts: list[Any]
    sums: Tensor
    errors: Tensor
    norms: Tensor
    largest_error: float
    largest_norm: float

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> "CertifiedScreen":
        """Quantise rows, each with a scale of its own.

        Args:
            weight: rows in fp32 or half precision, [V, d].
        """
        codes = torch.empty(weight.shape, dtype=torch.int8)
        scales, errors, norms = torch.empty(3, len(weight))
        at_once = fit_in_cache(torch.float32.itemsize * weight.shape[1])
        for start in range(0, len(weight), at_once):
            some = slice(start, start + at_once)
            exact = weight[some].float()
            scales[some] = exact.abs().amax(dim=-1).clamp_min_(SMALLEST) / LARGEST_WEIGHT
            rounded = (exact / scales[some].unsqueeze(-1)).round_()
            codes[some], norms[some] = rounded, exact.norm(dim=-1)
            errors[some] = rounded.mul_(scales[some].unsqueeze(-1)).sub_(exact).norm(dim=-1)
        errors += _rounding(weight) * norms
        return cls(
            weight, _packed(codes, scales), _row_sums(weight), errors, norms, float(errors.max()), float(norms.max())
        )

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Exact logits of all tokens that could have the largest, -inf for the others.

        Args:
            hidden: hidden states, [N, d].

        Returns:
            Logits in the dtype of `hidden`, [N, V]; and where they prove nothing, [N] bool: the bound leaves too many
            tokens, or something is not finite.
        """
        logits = hidden.new_full((len(hidden), len(self.weight)), -torch.inf)
        is_unproven = torch.empty(len(hidden), dtype=torch.bool)
        for start in range(0, len(hidden), POSITIONS_AT_ONCE):
            some = slice(start, start + POSITIONS_AT_ONCE)
            is_unproven[some] = self._fill(logits[some], hidden[some])
        return logits, is_unproven

    def _fill(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Write exact logits, [N, V]; returns where they prove nothing, [N] bool."""
        exact = hidden.float()
        positions, ids = self._candidates(exact, torch.finfo(hidden.dtype))
        counts = positions.bincount(minlength=len(hidden))
        is_unproven = (counts == 0) | (counts > MOST_CANDIDATES * len(self.weight))
        if is_unproven.any():
            are_few = ~is_unproven[positions]
            positions, ids = positions[are_few], ids[are_few]
        found = (self.weight[ids].float() * exact[positions]).sum(dim=-1).to(hidden.dtype)
        logits[positions, ids] = found
        is_unproven[positions[~found.isfinite()]] = True
        return is_unproven

    def _candidates(self, hidden: Tensor, dtype: torch.finfo) -> tuple[Tensor, Tensor]:
        """Positions and token ids that could have the largest logit, for fp32 [N, d], as a head in `dtype` rounds."""
        steps = hidden.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST) / (LARGEST_DIGIT * BASE)
        numbers = (hidden / steps).round_()
        estimates = self._products(numbers)  # in steps
        length, rest = (some.norm(dim=-1, keepdim=True) for some in (numbers * steps, hidden - numbers * steps))
        reached = self._reached(hidden, length, estimates, dtype)
        # One bound for all rows leaves some hundred tokens, each row's own bound a handful.
        least = (reached - length * self.largest_error - rest * self.largest_norm) / steps
        places = torch.from_numpy((estimates >= least).numpy().ravel().nonzero()[0])
        positions, ids = places // len(self.weight), places % len(self.weight)
        bounds = length[positions, 0] * self.errors[ids] + rest[positions, 0] * self.norms[ids]
        could_win = estimates.view(-1)[places] * steps[positions, 0] + bounds >= reached[positions, 0]
        return positions[could_win], ids[could_win]

    def _reached(self, hidden: Tensor, length: Tensor, estimates: Tensor, dtype: torch.finfo) -> Tensor:
        """A lower bound of the largest dense logit, [N, 1]: a token's exact one, less all rounding."""
        best = torch.from_numpy(estimates.numpy().argmax(axis=1))
        reached = (self.weight[best].float() * hidden).sum(dim=-1, keepdim=True)
        of_logits = 2 * dtype.eps * reached.abs().clamp_min(dtype.tiny)
        return reached - of_logits - _rounding(self.weight) * self.norms[best].unsqueeze(1) * length

    def _products(self, numbers: Tensor) -> Tensor:
        """Products of the int8 rows with integers of two digits, fp32 [N, V]."""
        first = (numbers / BASE).round_()
        multiply, digits = getattr(torch.ops.quantized, MULTIPLY), torch.cat([first, numbers - BASE * first])
        products = torch.empty(len(numbers), len(self.weight))
        for part, place in zip(self.parts, products.split(ROWS_OF_PART, dim=1), strict=True):
            of_first, of_second = multiply(digits, 1.0, ZERO, part).chunk(2)
            torch.add(of_second, of_first, alpha=BASE, out=place)
        return products


def _rounding(weight: Tensor) -> float:
    """What two sums of d products in fp32, the dense head's and ours, may round, relative to both lengths."""
    return 2 * weight.shape[1] * torch.finfo(torch.float32).eps


def _row_sums(weight: Tensor) -> Tensor:
    """Sums of each row's bytes in words, [V]: every change of a number changes one, and memory limits their speed."""
    rows = weight.detach().contiguous()
    size = rows.shape[1] * rows.itemsize
    word = next(word for word in (torch.int64, torch.int32, torch.int16) if size % word.itemsize == 0)
    return rows.view(word).sum(dim=-1, dtype=word)


_screens: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by weight
_packing = Lock()


def greedy_logits_of(head: TopKExpertsHead) -> Callable[[Tensor], Tensor]:
    """What computes dense logits fastest if only the largest at each position counts.

    Args:
        head: the head; its weight is quantised at first use, and must not change while the function is in use.

    Returns:
        A function from hidden states [..., d] to logits [..., V], in the same dtype; those of tokens that cannot have
        the largest may be -inf.
    """
    weight, is_possible = head.weight, can_certify(head)
    # The sums show changes of `weight.data`, too, such as those of merged adapters.
    if (known := _screens.get(weight)) and not (is_possible and _row_sums(weight).equal(known.sums)):
        del _screens[weight]
    return partial(_certified_logits, head) if is_possible and _is_faster(head, 1) else head.fastest_dense_logits


def _certified_logits(head: TopKExpertsHead, hidden: Tensor) -> Tensor:
    flat = hidden.flatten(0, -2)
    if hidden.dtype != head.weight.dtype or not _is_faster(head, len(flat)):
        return head.fastest_dense_logits(hidden)
    screen = _screens.get(head.weight)
    if screen is None:
        screen = _screens[head.weight] = CertifiedScreen.of(head.weight.detach())
    logits, is_unproven = screen.logits(flat)
    if is_unproven.any():
        logits[is_unproven] = head.fastest_dense_logits(flat[is_unproven])
    return logits.view(*hidden.shape[:-1], -1)


def can_certify(head: TopKExpertsHead) -> bool:
    """Whether a certified screen supports this head on this machine, and the dense head rounds as it expects.

    Args:
        head: the head.
    """
    weight = head.weight
    is_plain = type(weight) is nn.Parameter and weight.shape == (head.out_features, head.in_features)
    fits = is_plain and weight.is_cpu and weight.is_floating_point() and weight.itemsize <= torch.float32.itemsize
    is_precise = weight.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    rounds_as_expected = is_precise and not torch.is_autocast_enabled("cpu")
    return fits and rounds_as_expected and head.full_bias is None and _has_kernel()


def _has_kernel() -> bool:
    operators = [hasattr(torch.ops.quantized, name) for name in (PACK, MULTIPLY)]
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(torch, QUANTISE) and all(operators)


def _is_faster(head: TopKExpertsHead, positions: int) -> bool:
    """Whether a certified screen is faster than each dense product, measured on some of the rows."""
    if positions > MOST_POSITIONS:
        return False
    measured = min(MOST_MEASURED, max(FEWEST_MEASURED, positions))  # rounded up to a power of two
    rows = head.weight[:ROWS_OF_PART].detach()
    screens: list[CertifiedScreen] = []

    def screened(hidden: Tensor) -> None:
        if not screens:
            screens.append(CertifiedScreen.of(rows))
        _, is_unproven = screens[0].logits(hidden)
        if is_unproven.any():
            F.linear(hidden[is_unproven], rows)

    dense = {f"float32 {columns}": partial(_in_float32, rows=rows, columns=columns) for columns in (NARROW, WIDE)}
    dense["linear"] = partial(F.linear, weight=rows)
    return all(is_faster(screened, run, head, measured, "certified", name) for name, run in dense.items())


def _in_float32(hidden: Tensor, rows: Tensor, columns: int) -> Tensor:
    return linear_in_float32(hidden, rows, None, columns)


def _packed(codes: Tensor, scales: Tensor) -> list[Any]:
    """Put int8 rows into the layout of FBGEMM's kernel, some rows at a time."""
    # Engine and filters are those of the whole process.
    with _packing, _fbgemm(), warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as threads:
        # torch deprecates its quantised dtypes, and has no other product of int8 rows that is fast on every x86 CPU.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation", category=UserWarning)
        return list(threads.map(_pack, codes.split(ROWS_OF_PART), scales.split(ROWS_OF_PART)))


def _pack(codes: Tensor, scales: Tensor) -> Any:
    zeros = torch.zeros(len(codes), dtype=torch.long)
    quantised = getattr(torch, QUANTISE)(codes, scales.double(), zeros, 0)
    return getattr(torch.ops.quantized, PACK)(quantised, None)


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Make FBGEMM the engine of quantised layers; the default is another one on some processors."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
