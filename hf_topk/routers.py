"""Routers: from a hidden state to a score for each expert.

Score e estimates the log-sum-exp of the dense logits of expert e. Every router starts from the mean row of each
expert and, but for `centroid`, learns a correction to it by distillation. Once learned, its matrices can be kept as
int8.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .kernels import Rounded, int8_logits, rounded_for

SMALLEST_SCALE = 1e-30


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
    def to_int8(self, dtype: torch.dtype) -> None:
        """Keep every matrix as int8 from now on, with a scale a row; nothing but biases can be trained then.

        Args:
            dtype: type of the scales; the rounding takes into account how it rounds them.
        """
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
        if self.down.is_floating_point():
            init.normal_(self.down, std=self.down.shape[1] ** -0.5)

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


# Not `type[Router]`, whose signature says nothing of how a router is made.
ROUTERS: dict[str, type[LinearRouter] | type[AttentionRouter]] = {
    "attention": AttentionRouter,
    "centroid": CentroidRouter,
    "linear": LinearRouter,
    "low_rank": LowRankRouter,
    "mlp": MlpRouter,
}
