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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from .crossover import is_faster
from .head import TopKExpertsHead
from .kernels import CACHED_BYTES, NARROW, WIDE, linear_in_float32

LARGEST_WEIGHT = 127
# FBGEMM's kernel for processors without int8 instructions adds two products in 16 bits, so that hidden states have
# seven bits: here two digits of [-63, 63], of which the first counts 64 times as much.
LARGEST_DIGIT, BASE = 63, 64
PACK, MULTIPLY = "linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32"  # operators of torch
ZERO = 64  # the kernel's code of a digit of 0
POSITIONS_AT_ONCE = 8
ROWS_OF_PART = 1 << 15  # of the copy; packing fewer at once is faster, and products of one part tell those of all
MOST_CANDIDATES = 1 / 64  # of the tokens at a position; with more the dense head is faster
SMALLEST = 1e-30


@dataclass(frozen=True)
class CertifiedScreen:
    """An int8 copy of rows, and what it differs from them by.

    Attributes:
        weight: the rows W, [V, d].
        parts: their int8 copy in the kernel's layout, some rows at a time.
        errors: ||w - w'|| of each row, and what products in fp32 may round, fp32 [V].
        norms: ||w|| of each row, fp32 [V].
        largest_error: the largest of `errors`.
        largest_norm: the largest of `norms`.
    """

    weight: Tensor
    parts: list[Any]
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
        rows = torch.empty(weight.shape, dtype=torch.int8)
        scales, errors, norms = torch.empty(3, len(weight))
        at_once = max(1, CACHED_BYTES // (4 * weight.shape[1]))
        parts = (some.split(at_once) for some in (weight, rows, scales, errors, norms))
        for some, codes, scale, error, norm in zip(*parts, strict=True):
            exact = some.float()
            scale.copy_(exact.abs().amax(dim=-1).clamp_min_(SMALLEST)).div_(LARGEST_WEIGHT)
            rounded = (exact / scale.unsqueeze(-1)).round_()
            codes.copy_(rounded)
            norm.copy_(exact.norm(dim=-1))
            error.copy_(rounded.mul_(scale.unsqueeze(-1)).sub_(exact).norm(dim=-1))
        errors += 2 * weight.shape[1] * torch.finfo(torch.float32).eps * norms
        return cls(weight, _packed(rows, scales), errors, norms, float(errors.max()), float(norms.max()))

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Exact logits of all tokens that could have the largest, -inf for the others.

        Args:
            hidden: hidden states, [N, d].

        Returns:
            Logits in the dtype of `hidden`, [N, V]; and where they say nothing, as the bound leaves too many tokens or
            something is not finite, [N] bool.
        """
        logits = hidden.new_full((len(hidden), len(self.weight)), -torch.inf)
        is_open = torch.empty(len(hidden), dtype=torch.bool)
        for some, *found in zip(*(each.split(POSITIONS_AT_ONCE) for each in (hidden, logits, is_open)), strict=True):
            self._write_logits(some, *found)
        return logits, is_open

    def _write_logits(self, hidden: Tensor, logits: Tensor, is_open: Tensor) -> None:
        exact = hidden.float()
        positions, ids = self._candidates(exact, torch.finfo(hidden.dtype))
        counts = positions.bincount(minlength=len(hidden))
        torch.logical_or(counts == 0, counts > MOST_CANDIDATES * len(self.weight), out=is_open)
        if is_open.any():
            are_few = ~is_open[positions]
            positions, ids = positions[are_few], ids[are_few]
        found = (self.weight[ids].float() * exact[positions]).sum(dim=-1).to(hidden.dtype)
        logits[positions, ids] = found
        is_open[positions[~found.isfinite()]] = True

    def _candidates(self, hidden: Tensor, dtype: torch.finfo) -> tuple[Tensor, Tensor]:
        """Positions and token ids that could have the largest logit, for fp32 [N, d], as a head in `dtype` rounds."""
        steps = hidden.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST) / (LARGEST_DIGIT * BASE)
        numbers = (hidden / steps).round_()
        estimates = self._products(numbers)  # in steps
        # The exact logit of any token is a lower bound of the largest.
        best = torch.from_numpy(estimates.numpy().argmax(axis=1))
        reached = (self.weight[best].float() * hidden).sum(dim=-1, keepdim=True)
        reached -= 2 * dtype.eps * reached.abs().clamp_min(dtype.tiny)
        length, left = (some.norm(dim=-1, keepdim=True) for some in (numbers * steps, hidden - numbers * steps))
        least = (reached - length * self.largest_error - left * self.largest_norm) / steps
        places = torch.from_numpy((estimates >= least).numpy().ravel().nonzero()[0])
        positions, ids = places // len(self.weight), places % len(self.weight)
        # The same with each row's own bound.
        bounds = length[positions, 0] * self.errors[ids] + left[positions, 0] * self.norms[ids]
        could_win = estimates.view(-1)[places] * steps[positions, 0] + bounds >= reached[positions, 0]
        return positions[could_win], ids[could_win]

    def _products(self, numbers: Tensor) -> Tensor:
        """Products of the int8 rows with integers of two digits, fp32 [N, V]."""
        first = (numbers / BASE).round_()
        multiply, digits = getattr(torch.ops.quantized, MULTIPLY), torch.cat([first, numbers - BASE * first])
        products = torch.empty(len(numbers), len(self.weight))
        for part, place in zip(self.parts, products.split(ROWS_OF_PART, dim=1), strict=True):
            of_first, of_second = multiply(digits, 1.0, ZERO, part).chunk(2)
            torch.add(of_second, of_first, alpha=BASE, out=place)
        return products


_screens: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by weight: its version, and its screen


def greedy_logits_of(head: TopKExpertsHead) -> Callable[[Tensor], Tensor]:
    """What computes dense logits fastest if only the largest at each position counts.

    Args:
        head: the head; its weight is quantised at first use.

    Returns:
        A function from hidden states [..., d] to logits [..., V], in the same dtype; those of tokens that cannot have
        the largest may be -inf.
    """
    return partial(_certified_logits, head) if can_certify(head) and _is_faster(head) else head.fastest_dense_logits


def _certified_logits(head: TopKExpertsHead, hidden: Tensor) -> Tensor:
    flat = hidden.flatten(0, -2)
    logits, is_open = _screen_of(head.weight).logits(flat)
    if is_open.any():
        logits[is_open] = head.fastest_dense_logits(flat[is_open])
    return logits.view(*hidden.shape[:-1], -1)


def can_certify(head: TopKExpertsHead) -> bool:
    """Whether a certified screen supports this head on this machine.

    Args:
        head: the head.
    """
    weight = head.weight
    is_plain = type(weight) in (Tensor, nn.Parameter) and weight.shape == (head.out_features, head.in_features)
    fits = is_plain and weight.is_cpu and weight.is_floating_point() and weight.itemsize <= torch.float32.itemsize
    return fits and head.full_bias is None and _has_kernel() and not torch.compiler.is_compiling()


def _has_kernel() -> bool:
    has_engine = "fbgemm" in torch.backends.quantized.supported_engines
    return has_engine and all(hasattr(torch.ops.quantized, name) for name in (PACK, MULTIPLY))


def _is_faster(head: TopKExpertsHead) -> bool:
    """Whether a certified screen is faster than each dense product, measured on some of the rows."""
    rows = head.weight[:ROWS_OF_PART].detach()
    screens: list[CertifiedScreen] = []

    def screened(hidden: Tensor) -> tuple[Tensor, Tensor]:
        if not screens:
            screens.append(CertifiedScreen.of(rows))
        return screens[0].logits(hidden)

    dense = {f"float32 {columns}": partial(_in_float32, rows=rows, columns=columns) for columns in (NARROW, WIDE)}
    dense["linear"] = partial(F.linear, weight=rows)
    return all(is_faster(screened, run, head, POSITIONS_AT_ONCE, "certified", name) for name, run in dense.items())


def _in_float32(hidden: Tensor, rows: Tensor, columns: int) -> Tensor:
    return linear_in_float32(hidden, rows, None, columns)


def _screen_of(weight: Tensor) -> CertifiedScreen:
    """The screen of a weight, made at first use and after each change."""
    version = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    known = _screens.get(weight)
    if known is None or known[0] != version:
        known = _screens[weight] = version, CertifiedScreen.of(weight.detach())
    return known[1]


def _packed(rows: Tensor, scales: Tensor) -> list[Any]:
    """Put int8 rows into the layout of FBGEMM's kernel, some rows at a time."""
    with _fbgemm(), warnings.catch_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as threads:
        # torch deprecates its quantised dtypes, and has no other product of int8 rows that is fast on every x86 CPU.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation", category=UserWarning)
        return list(threads.map(_pack, rows.split(ROWS_OF_PART), scales.split(ROWS_OF_PART)))


def _pack(rows: Tensor, scales: Tensor) -> Any:
    zeros = torch.zeros(len(rows), dtype=torch.long)
    quantised = torch._make_per_channel_quantized_tensor(rows, scales.double(), zeros, 0)
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
