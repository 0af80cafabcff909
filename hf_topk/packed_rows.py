"""Products of hidden states with many rows that are kept in few bits."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .kernels import expert_packed_logits, int8_logits, pack, packed_logits, unpack

SMALLEST_SCALE = 1e-30


class PackedRows(nn.Module):
    """Rows of which r numbers are kept, a third of them in 4 bits, the others in 2.

    <row_v, h> is taken for <codes_v, B h - c> + bias_v, up to what is the same for all rows. The factors come from a
    data-weighted SVD (DRONE, Chen et al. 2021, https://openreview.net/forum?id=T-cHNfhQYS): it minimises the error of
    the products themselves. A direction, one row of the int8 matrix B, has one step for all rows, which is part of B,
    and fewer bits where there is less to tell, as rate-distortion theory has it for independent components (reverse
    water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3).
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
            shape: how the rows are laid out: (M,), or (M, S) for the tokens of M experts.
            rank: r; a few directions more are kept where bytes would not be full.
        """
        super().__init__()
        bytes_4bit, bytes_2bit = -(-rank // 6), -(-(rank - rank // 3) // 4)
        self.directions_4bit, directions_2bit = 2 * bytes_4bit, 4 * bytes_2bit
        directions = self.directions_4bit + directions_2bit
        self.register_buffer("basis", torch.empty(directions, hidden_size, dtype=torch.int8))
        self.register_buffer("basis_scales", torch.empty(directions))
        self.register_buffer("center", torch.empty(directions))
        self.register_buffer("codes_4bit", torch.empty(*shape, bytes_4bit, dtype=torch.uint8))
        self.register_buffer("codes_2bit", torch.empty(*shape, bytes_2bit, dtype=torch.uint8))

    @property
    def bits(self) -> Tensor:
        """Bits of each direction, [r]."""
        bits = torch.full((len(self.basis),), 2, device=self.basis.device)
        bits[: self.directions_4bit] = 4
        return bits

    def reset_parameters(self) -> None:
        """Set to rows of zeros what was not loaded."""
        for tensor in (*self.parameters(), *self.buffers()):
            init.zeros_(tensor)

    def products(self, hidden: Tensor) -> Tensor:
        """Products with all rows, less the bias: [N, d] of any float type to fp32 [N, *shape]."""
        first, others = self._projected(hidden)
        products = packed_logits(first, self.codes_4bit.flatten(0, -2), 4)
        products = products + packed_logits(others, self.codes_2bit.flatten(0, -2), 2)
        return products.unflatten(-1, self.codes_4bit.shape[:-1])

    def products_of(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """Products with the rows of picked experts, less the bias: [N, d] and [N, k] to fp32 [N, k, S]."""
        first, others = self._projected(hidden)
        products = expert_packed_logits(first, self.codes_4bit, 4, experts)
        return products + expert_packed_logits(others, self.codes_2bit, 2, experts)

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of hidden states in the directions of 4 and of 2 bits, fp32 [N, r] in all."""
        projected = int8_logits(hidden, self.basis, self.basis_scales) - self.center.float()
        return projected[:, : self.directions_4bit], projected[:, self.directions_4bit :]

    @torch.no_grad()
    def set_basis(self, basis: Tensor, mean: Tensor, dtype: torch.dtype) -> None:
        """Set the directions.

        Args:
            basis: a step of each direction times the direction, [r, d].
            mean: the hidden state at which all coordinates are 0, [d].
            dtype: type that scales and center are stored in; the rounding takes it into account.
        """
        scales = (basis.abs().amax(dim=-1).clamp_min(SMALLEST_SCALE) / 127.0).to(dtype).to(basis)
        self.basis.copy_((basis / scales.unsqueeze(-1)).round().clamp(-127, 127))
        self.basis_scales.copy_(scales)
        self.center.copy_(self.float_basis() @ mean)

    def float_basis(self) -> Tensor:
        """B, fp32 [r, d]."""
        return self.basis.float() * self.basis_scales.float().unsqueeze(-1)

    @torch.no_grad()
    def set_codes(self, some: slice, coordinates: Tensor) -> None:
        """Round rows to codes.

        Args:
            some: which, along the first dimension.
            coordinates: of these rows, in steps, [n, ..., r].
        """
        bits = self.bits
        # From zero up: what that adds is the same for all rows.
        codes = (round_to_levels(coordinates, bits) + 2 ** (bits - 1)).to(torch.uint8)
        first, others = codes.split([self.directions_4bit, len(bits) - self.directions_4bit], dim=-1)
        self.codes_4bit[some] = pack(first.flatten(0, -2), 4).view_as(self.codes_4bit[some])
        self.codes_2bit[some] = pack(others.flatten(0, -2), 2).view_as(self.codes_2bit[some])

    def coordinates(self) -> Tensor:
        """What the codes stand for, in steps: fp32 [*shape, r]."""
        codes = torch.cat([unpack(self.codes_4bit, 4), unpack(self.codes_2bit, 2)], dim=-1)
        return codes - (2**self.bits - 1) / 2


def round_to_levels(values: Tensor, bits: Tensor) -> Tensor:
    """The whole numbers n for which n + 1/2 is nearest, from -2^(bits - 1) to 2^(bits - 1) - 1.

    Args:
        values: in steps, [..., r].
        bits: of each direction, [r].
    """
    half = 2 ** (bits - 1)
    return torch.minimum(torch.maximum(values.floor(), -half), half - 1)
