"""Products of hidden states with many rows that are stored in few bits."""

import operator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .kernels import (
    FourBitRows,
    four_bit_products,
    four_bit_rows,
    int8_products,
    pack,
    packed_products,
    runs_on_triton,
    suits_int_kernels,
    unpack_halves,
)

SMALLEST_SCALE = 1e-30
PREPARED_FROM = ("basis", "basis_scales", "center", "codes_4bit", "codes_2bit", "bias")


class Prepared(NamedTuple):
    """Rows unpacked for multiplication.

    Attributes:
        basis: B without its scales, int8 [r, d], in aligned memory.
        halves: the coordinates in half steps, which are odd integers, int8 [*shape, r].
        words: the same as int32, four to a word, for copying; as they are where they do not fill words.
        four_bit: the same for torch's kernel for 4 bits; None if it does not support them.
        ones: a scale of 1 for each row, bfloat16 [rows].
        half_scales, half_center: half of the basis' scales and of the center, bfloat16 [r].
        bias: fp32 [*shape].
    """

    basis: Tensor
    halves: Tensor
    words: Tensor
    four_bit: FourBitRows | None
    ones: Tensor
    half_scales: Tensor
    half_center: Tensor
    bias: Tensor


class PackedRows(nn.Module):
    """Rows of r quantised numbers, about a third of them in 4 bits, the others in 2.

    <row_v, h> is approximated by <x_v, B h - center> + bias_v, up to a term that is the same for all rows; the numbers
    in x_v lie halfway between integers. The factors come from a data-weighted SVD (DRONE, Chen et al. 2021,
    https://openreview.net/forum?id=T-cHNfhQYS), which minimises the error of the products. Each direction, a row of the
    int8 matrix B, has one quantisation step for all rows, which is part of B. Directions of less variance get fewer
    bits, as rate-distortion theory asks for (reverse water-filling: Cover and Thomas, Elements of Information Theory,
    10.3.3).
    """

    basis: Tensor
    basis_scales: Tensor
    center: Tensor
    codes_4bit: Tensor
    codes_2bit: Tensor
    bias: Tensor | nn.Parameter

    def __init__(self, hidden_size: int, shape: tuple[int, ...], rank: int) -> None:
        """Make rows of zeros.

        Args:
            hidden_size: d.
            shape: of the rows: (M,), or (M, S) for the tokens of M experts.
            rank: r; rounded up to full bytes.
        """
        super().__init__()
        bytes_4bit = max(1, 2 * round(rank / 12))  # even, so that a rank that fills words stays as it is
        bytes_2bit = max(1, -(-(rank - 2 * bytes_4bit) // 4))
        self.directions_4bit, directions_2bit = 2 * bytes_4bit, 4 * bytes_2bit
        directions = self.directions_4bit + directions_2bit
        self.register_buffer("basis", torch.empty(directions, hidden_size, dtype=torch.int8))
        self.register_buffer("basis_scales", torch.empty(directions))
        self.register_buffer("center", torch.empty(directions))
        self.register_buffer("codes_4bit", torch.empty(*shape, bytes_4bit, dtype=torch.uint8))
        self.register_buffer("codes_2bit", torch.empty(*shape, bytes_2bit, dtype=torch.uint8))
        self._kept: Prepared | None = None
        self._kept_of: tuple[Tensor, ...] = ()
        self._versions: list[int] = []

    @property
    def bits(self) -> Tensor:
        """Bits of each direction, [r]."""
        bits = torch.full((len(self.basis),), 2, device=self.basis.device)
        bits[: self.directions_4bit] = 4
        return bits

    def reset_parameters(self) -> None:
        """Set tensors that were not loaded to zeros."""
        for tensor in (*self.parameters(), *self.buffers()):
            init.zeros_(tensor)

    def products(self, hidden: Tensor) -> Tensor:
        """Products with all rows, and the bias: [N, d] of any float dtype to fp32 [N, *shape]."""
        if runs_on_triton(hidden, self.codes_4bit):
            return self._packed_products(hidden, None) + self.bias.float()
        prepared = self._prepared()
        projected, bias = self._projected(hidden, prepared), self._float_bias(prepared)
        if prepared.four_bit is not None and suits_int_kernels(projected):
            return four_bit_products(projected, prepared.four_bit) + bias
        products = int8_products(projected, prepared.halves.flatten(0, -2), prepared.ones)
        return products.unflatten(-1, prepared.halves.shape[:-1]) + bias

    def _float_bias(self, prepared: "Prepared") -> Tensor:
        return self.bias.float() if torch.is_grad_enabled() else prepared.bias

    def _packed_products(self, hidden: Tensor, experts: Tensor | None) -> Tensor:
        from .triton_kernels import int8_products as on_triton

        shape = self.codes_4bit.shape[:-1]
        first, others = (some.view(shape[0], -1, some.shape[-1]) for some in (self.codes_4bit, self.codes_2bit))
        projected = on_triton(hidden, self.basis, self.basis_scales, self.center)
        products = packed_products(projected, first, others, experts)
        return products if len(shape) > 1 else products.squeeze(-1)

    def _projected(self, hidden: Tensor, prepared: "Prepared") -> Tensor:
        """Half of the coordinates of hidden states, bfloat16 or fp32 [N, r]."""
        return int8_products(hidden, prepared.basis, prepared.half_scales).sub_(prepared.half_center)

    def _prepared(self) -> "Prepared":
        """The rows unpacked to int8, at first use, and cached.

        Exported code would contain the cached tensors, and code compiled before the first use does not have them: both
        unpack to floats in each call.
        """
        if torch.compiler.is_exporting() or (torch.compiler.is_compiling() and self._kept is None):
            made = self._unpacked()
            halves = made.halves.float()
            return made._replace(basis=made.basis.float(), halves=halves, words=halves)
        if torch.compiler.is_compiling():
            return cast(Prepared, self._kept)
        tensors = {**self._buffers, **self._parameters}  # a lookup here costs a tenth of one through the module
        source = tuple(cast(Tensor, tensors[name]) for name in PREPARED_FROM)
        versions = [0 if some.is_inference() else some._version for some in source]
        if self._kept is None or self._versions != versions or any(map(operator.is_not, self._kept_of, source)):
            with torch.inference_mode(False), torch.no_grad():  # so that autograd can use them later
                self._kept, self._kept_of, self._versions = self._prepare(), source, versions
        return self._kept

    def _prepare(self) -> "Prepared":
        made = self._unpacked()
        is_one_matrix = made.halves.dim() == 2  # the rows of picked experts are copied from the int8 rows
        return made._replace(four_bit=four_bit_rows(made.halves)) if is_one_matrix else made

    def _unpacked(self) -> "Prepared":
        halves = unpack_halves(self.codes_4bit, self.codes_2bit)
        ones = torch.ones(halves.shape[:-1].numel(), dtype=torch.bfloat16, device=halves.device)
        half_scales, half_center = ((some / 2).bfloat16() for some in (self.basis_scales, self.center))
        words = halves.view(torch.int32) if halves.shape[-1] % 4 == 0 else halves
        bias = self.bias.float()
        return Prepared(self.basis.clone(), halves, words, None, ones, half_scales, half_center, bias)

    @torch.no_grad()
    def set_basis(self, basis: Tensor, mean: Tensor, dtype: torch.dtype) -> None:
        """Set the directions.

        Args:
            basis: the step of each direction times the direction, [r, d].
            mean: the hidden state at which all coordinates are 0, [d].
            dtype: of scales and center on disk; the rounding takes it into account.
        """
        scales = (basis.abs().amax(dim=-1).clamp_min(SMALLEST_SCALE) / 127.0).to(dtype).to(basis)
        self.basis.copy_((basis / scales.unsqueeze(-1)).round().clamp(-127, 127))
        self.basis_scales.copy_(scales)
        self.center.copy_((self.float_basis() @ mean).bfloat16())  # as the products subtract it

    def float_basis(self) -> Tensor:
        """B, fp32 [r, d]."""
        return self.basis.float() * self.basis_scales.float().unsqueeze(-1)

    @torch.no_grad()
    def set_codes(self, some: slice, coordinates: Tensor) -> None:
        """Round rows to codes.

        Args:
            some: the rows, along the first dimension.
            coordinates: of these rows, in steps, [n, ..., r].
        """
        bits = self.bits
        codes = (round_to_levels(coordinates, bits) + 2 ** (bits - 1)).to(torch.uint8)
        first, others = codes.split([self.directions_4bit, len(bits) - self.directions_4bit], dim=-1)
        self.codes_4bit[some] = pack(first.flatten(0, -2), 4).view_as(self.codes_4bit[some])
        self.codes_2bit[some] = pack(others.flatten(0, -2), 2).view_as(self.codes_2bit[some])

    def coordinates(self) -> Tensor:
        """The values of the codes, in steps: fp32 [*shape, r]."""
        return unpack_halves(self.codes_4bit, self.codes_2bit) / 2


def round_to_levels(values: Tensor, bits: Tensor) -> Tensor:
    """The integers n for which n + 1/2 is nearest, from -2^(bits - 1) to 2^(bits - 1) - 1.

    Args:
        values: in steps, [..., r].
        bits: of each direction, [r].
    """
    half = 2 ** (bits - 1)
    return torch.minimum(torch.maximum(values.floor(), -half), half - 1)
