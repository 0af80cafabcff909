"""Routers: from a hidden state to a score for each expert.

Score e estimates the log-sum-exp of the dense logits of expert e. Every router starts from the mean row of each
expert and, but for `centroid`, learns a correction to it by distillation. Once learned, its matrices can be kept as
int8.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .kernels import Rounded, int8_logits, pack, packed_logits, rounded_for, unpack

SMALLEST_SCALE = 1e-30
BITS, LEVELS = 4, 16
DIRECTIONS = 256  # of the hidden states, that the rows of experts are kept in
# The step of a grid of 16 levels that rounds a normal variable best, in standard deviations (Max 1960,
# https://doi.org/10.1109/TIT.1960.1057548).
STEP = 0.335
SMALLEST_VARIANCE = 1e-6  # of a direction of the hidden states, as a share of the largest


class Router(nn.Module):
    """What all kinds share. Products are fp32, and stay so when biases of fewer bits are added.

    Attributes:
        bias: added to the scores, [M] or [M, keys].
    """

    bias: nn.Parameter

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Set to scores of zero what was not loaded."""
        for tensor in (*self.parameters(), *self.buffers()):
            init.zeros_(tensor)

    def inward(self) -> list[nn.Parameter]:
        """The parameters that multiply the hidden state itself, and so scale inversely with it."""
        raise NotImplementedError

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that distillation learns."""
        return list(self.parameters())

    def product(self, name: str, inputs: Tensor | Rounded) -> Tensor:
        """Multiply with the matrix of a name: [N, columns] of any float type, or rounded, to fp32 [N, rows]."""
        matrix = getattr(self, name).flatten(0, -2)
        if isinstance(inputs, Rounded) or matrix.dtype == torch.int8:
            return int8_logits(inputs, matrix, getattr(self, f"{name}_scales").flatten())
        return F.linear(inputs.float(), matrix.float())

    def for_products(self, name: str, hidden: Tensor) -> Tensor | Rounded:
        """Hidden states, rounded once for the products with all matrices like the one of a name where they are int8."""
        matrix = getattr(self, name)
        return rounded_for(hidden, matrix) if matrix.dtype == torch.int8 else hidden

    @torch.no_grad()
    def to_int8(self, dtype: torch.dtype, states: Tensor | None = None) -> None:
        """Keep every matrix as int8 from now on, with a scale a row; nothing but biases can be trained then.

        Args:
            dtype: type of the scales; the rounding takes into account how it rounds them.
            states: hidden states, [N, d], whose scores are to change least; kinds of 8 bits need none.
        """
        del states
        matrices = {name: matrix for name, matrix in self.named_parameters() if not name.endswith("bias")}
        for name, matrix in matrices.items():
            scales = (matrix.float().abs().amax(dim=-1).clamp_min(SMALLEST_SCALE) / 127.0).to(dtype)
            codes = (matrix.float() / scales.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
            delattr(self, name)
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scales", scales)

    @torch.no_grad()
    def to_float(self) -> None:
        """Keep every int8 matrix as floats, of the type of its scales, from now on, so that it can be trained."""
        matrices = {name: codes for name, codes in self.named_buffers() if codes.dtype == torch.int8}
        for name, codes in matrices.items():
            scales = getattr(self, f"{name}_scales")
            delattr(self, name)
            delattr(self, f"{name}_scales")
            self.register_parameter(name, nn.Parameter((codes.float() * scales.float().unsqueeze(-1)).to(scales.dtype)))


class LinearRouter(Router):
    """One learned row an expert, started at the mean of its rows: scores = R h + b."""

    mean_rows: nn.Parameter

    def __init__(self, hidden_size: int, num_experts: int, rank: int) -> None:
        """Make an untrained router.

        Args:
            hidden_size: d.
            num_experts: M.
            rank: not used by this kind.
        """
        super().__init__()
        self.mean_rows = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts))
        Router.reset_parameters(self)

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        return self.product("mean_rows", hidden) + self.bias

    def inward(self) -> list[nn.Parameter]:
        """The parameters that multiply the hidden state itself, and so scale inversely with it."""
        return [self.mean_rows]


class CentroidRouter(LinearRouter):
    """The mean row of each expert, not trained."""

    def trainable(self) -> list[nn.Parameter]:
        """Nothing."""
        return []


class LowRankRouter(LinearRouter):
    """Mean rows and a correction of low rank: scores = (R + U V') h + b."""

    down: nn.Parameter
    up: nn.Parameter

    def __init__(self, hidden_size: int, num_experts: int, rank: int) -> None:
        """Make an untrained router.

        Args:
            hidden_size: d.
            num_experts: M.
            rank: r, the rank of U V'.
        """
        super().__init__(hidden_size, num_experts, rank)
        self.down = nn.Parameter(torch.empty(rank, hidden_size))
        self.up = nn.Parameter(torch.empty(num_experts, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set what was not loaded so that training can begin: random features, of no weight yet."""
        super().reset_parameters()
        down = self._parameters.get("down")  # none once it is kept in few bits
        if down is not None:
            init.normal_(down, std=down.shape[1] ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        inputs = self.for_products("down", hidden)
        return self.product("mean_rows", inputs) + self.product("up", self.product("down", inputs)) + self.bias

    def inward(self) -> list[nn.Parameter]:
        """The parameters that multiply the hidden state itself, and so scale inversely with it."""
        return [self.mean_rows, self.down]

    def trainable(self) -> list[nn.Parameter]:
        """The correction; the mean rows stay."""
        return [self.down, self.up, self.bias]


class MlpRouter(LowRankRouter):
    """Mean rows and a two-layer feed-forward network: scores = R h + U gelu(D h + c) + b."""

    down_bias: nn.Parameter

    def __init__(self, hidden_size: int, num_experts: int, rank: int) -> None:
        """Make an untrained router.

        Args:
            hidden_size: d.
            num_experts: M.
            rank: width of the hidden layer.
        """
        super().__init__(hidden_size, num_experts, rank)
        self.down_bias = nn.Parameter(torch.empty(rank))
        self.reset_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        inputs = self.for_products("down", hidden)
        inner = self.product("down", inputs) + self.down_bias
        features = inner * torch.special.ndtr(inner)  # torch's own GELU starts up slowly on a CPU
        return self.product("mean_rows", inputs) + self.product("up", features) + self.bias

    def trainable(self) -> list[nn.Parameter]:
        """All of it."""
        return list(self.parameters())


class PackedMlpRouter(MlpRouter):
    """An `mlp` router whose matrices are kept in few bits once it is learned.

    The experts' rows, less their mean, are kept in the directions of the hidden states that change the scores most (a
    data-weighted SVD, as in DRONE: Chen et al. 2021, https://openreview.net/forum?id=T-cHNfhQYS), in 4 bits with a step
    a direction, as is the second layer of the network. What multiplies the hidden state itself is int8.
    """

    def __init__(self, hidden_size: int, num_experts: int, rank: int) -> None:
        """Make an untrained router.

        Args:
            hidden_size: d.
            num_experts: M.
            rank: width of the hidden layer; odd ones are raised by one.
        """
        super().__init__(hidden_size, num_experts, rank + rank % 2)

    @property
    def _is_packed(self) -> bool:
        return "codes" in self._buffers

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        if not self._is_packed:
            return super().forward(hidden)
        width = self.down_bias.shape[0]
        inward = int8_logits(hidden, self.get_buffer("inward_matrix"), self.get_buffer("inward_matrix_scales"))
        level, inner, directions = inward.tensor_split([1, 1 + width], dim=-1)
        inner = inner + self.down_bias
        features = inner * torch.special.ndtr(inner) * self.get_buffer("up_steps").float()
        scores = packed_logits(directions, self.get_buffer("codes"), BITS)
        scores = scores + packed_logits(features, self.get_buffer("up_codes"), BITS)
        middle = (LEVELS - 1) / 2 * (directions.sum(dim=-1, keepdim=True) + features.sum(dim=-1, keepdim=True))
        return scores + (level - middle) + self.bias

    @torch.no_grad()
    def to_int8(self, dtype: torch.dtype, states: Tensor | None = None) -> None:
        """Keep every matrix in few bits from now on; nothing but biases can be trained then.

        Args:
            dtype: type of scales and steps; the rounding takes into account how it rounds them.
            states: hidden states, [N, d], whose scores are to change least; None takes all directions alike.
        """
        rows, up = self.mean_rows.float(), self.up.float()
        level = rows.mean(dim=0, keepdim=True)
        factors, directions = _leading_factors(rows - level, states)
        codes, steps = _round(factors)
        up_codes, up_steps = _round(up, dtype)
        inward = torch.cat([level, self.down.float(), steps.unsqueeze(-1) * directions])
        scales = (inward.abs().amax(dim=-1).clamp_min(SMALLEST_SCALE) / 127.0).to(dtype)
        self._replace(("mean_rows", "down", "up"))
        self.register_buffer("inward_matrix", (inward / scales.float().unsqueeze(-1)).round().clamp(-127, 127).char())
        self.register_buffer("inward_matrix_scales", scales)
        self.register_buffer("codes", codes)
        self.register_buffer("up_codes", up_codes)
        self.register_buffer("up_steps", up_steps)

    @torch.no_grad()
    def to_float(self) -> None:
        """Keep all matrices as floats, of the type of the scales, from now on, so that they can be trained."""
        scales, width = self.get_buffer("inward_matrix_scales"), self.down_bias.shape[0]
        inward = self.get_buffer("inward_matrix").float() * scales.float().unsqueeze(-1)
        level, down, directions = inward.tensor_split([1, 1 + width])
        rows = _unrounded(self.get_buffer("codes")) @ directions + level
        up = _unrounded(self.get_buffer("up_codes")) * self.get_buffer("up_steps").float()
        self._replace(("inward_matrix", "inward_matrix_scales", "codes", "up_codes", "up_steps"))
        for name, matrix in (("mean_rows", rows), ("down", down), ("up", up)):
            self.register_parameter(name, nn.Parameter(matrix.to(scales.dtype)))

    def _replace(self, names: tuple[str, ...]) -> None:
        for name in names:
            delattr(self, name)


class AttentionRouter(Router):
    """Several keys an expert, log-sum-exp over them: each key stands for a group of the expert's tokens."""

    keys: nn.Parameter

    def __init__(self, hidden_size: int, num_experts: int, rank: int) -> None:
        """Make an untrained router.

        Args:
            hidden_size: d.
            num_experts: M.
            rank: the number of keys an expert.
        """
        super().__init__()
        self.keys = nn.Parameter(torch.empty(num_experts, rank, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts, rank))
        self.reset_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        key_scores = self.product("keys", hidden).unflatten(-1, self.bias.shape)
        return (key_scores + self.bias).logsumexp(dim=-1)

    def inward(self) -> list[nn.Parameter]:
        """The parameters that multiply the hidden state itself, and so scale inversely with it."""
        return [self.keys]


def _leading_factors(rows: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors [M, r] and directions [r, d] whose product is near to the rows, [M, d], on these states."""
    size = rows.shape[1]
    moment = torch.eye(size, device=rows.device)
    if states is not None:
        states = states.to(rows)
        moment = states.t() @ states / len(states)
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(values[-1].clamp_min(SMALLEST_SCALE) * SMALLEST_VARIANCE)
    root, inverse = ((vectors * power) @ vectors.t() for power in (values.sqrt(), values.rsqrt()))
    seen = rows @ root
    count = min(DIRECTIONS, size)
    leading = torch.linalg.eigh(seen.t() @ seen).eigenvectors.flip(-1)[:, :count]  # (d, r)
    factors, directions = seen @ leading, leading.t() @ inverse
    missing = count % 2
    return F.pad(factors, (0, missing)), F.pad(directions, (0, 0, 0, missing))


def _round(factors: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Packed levels and the step of each column: [M, r] to uint8 [M, r / 2] and [r] of a type."""
    steps = (STEP * factors.square().mean(dim=0).sqrt()).clamp_min(SMALLEST_SCALE).to(dtype)
    levels = (factors / steps.float() + LEVELS / 2).floor().clamp(0, LEVELS - 1)
    return pack(levels, BITS), steps


def _unrounded(codes: Tensor) -> Tensor:
    """What levels stand for, in steps: uint8 [M, r / 2] to fp32 [M, r]."""
    return unpack(codes, BITS).float() - (LEVELS - 1) / 2


# Not `type[Router]`, whose signature says nothing of how a router is made.
ROUTERS: dict[str, type[LinearRouter] | type[AttentionRouter]] = {
    "attention": AttentionRouter,
    "centroid": CentroidRouter,
    "linear": LinearRouter,
    "low_rank": LowRankRouter,
    "mlp": MlpRouter,
    "packed_mlp": PackedMlpRouter,
}
