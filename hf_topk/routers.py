"""Routers: from a hidden state to a score for each expert.

Score e estimates the log-sum-exp of the dense logits of expert e. Every router starts from the mean row of each
expert and, but for `centroid`, learns a correction to it by distillation.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init


class LinearRouter(nn.Module):
    """One learned row an expert, started at the mean of its rows: scores = R h + b."""

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
        LinearRouter.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Set to scores of zero what was not loaded."""
        init.zeros_(self.mean_rows)
        init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        return F.linear(hidden.float(), self.mean_rows.float(), self.bias.float())

    def inward(self) -> list[nn.Parameter]:
        """The parameters that multiply the hidden state itself, and so scale inversely with it."""
        return [self.mean_rows]

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that distillation learns."""
        return list(self.parameters())


class CentroidRouter(LinearRouter):
    """The mean row of each expert, not trained."""

    def trainable(self) -> list[nn.Parameter]:
        """Nothing."""
        return []


class LowRankRouter(LinearRouter):
    """Mean rows and a correction of low rank: scores = (R + U V') h + b."""

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
        init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        init.zeros_(self.up)

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        correction = F.linear(F.linear(hidden.float(), self.down.float()), self.up.float())
        return super().forward(hidden) + correction

    def inward(self) -> list[nn.Parameter]:
        """The parameters that multiply the hidden state itself, and so scale inversely with it."""
        return [self.mean_rows, self.down]

    def trainable(self) -> list[nn.Parameter]:
        """The correction; the mean rows stay."""
        return [self.down, self.up, self.bias]


class MlpRouter(LinearRouter):
    """Mean rows and a two-layer feed-forward network: scores = R h + U gelu(D h + c) + b."""

    def __init__(self, hidden_size: int, num_experts: int, rank: int) -> None:
        """Make an untrained router.

        Args:
            hidden_size: d.
            num_experts: M.
            rank: width of the hidden layer.
        """
        super().__init__(hidden_size, num_experts, rank)
        self.down = nn.Parameter(torch.empty(rank, hidden_size))
        self.down_bias = nn.Parameter(torch.empty(rank))
        self.up = nn.Parameter(torch.empty(num_experts, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set what was not loaded so that training can begin: random features, of no weight yet."""
        super().reset_parameters()
        init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        init.zeros_(self.down_bias)
        init.zeros_(self.up)

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        features = F.gelu(F.linear(hidden.float(), self.down.float(), self.down_bias.float()))
        return super().forward(hidden) + F.linear(features, self.up.float())

    def inward(self) -> list[nn.Parameter]:
        """The parameters that multiply the hidden state itself, and so scale inversely with it."""
        return [self.mean_rows, self.down]


class AttentionRouter(nn.Module):
    """Several keys an expert, log-sum-exp over them: each key stands for a group of the expert's tokens."""

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

    def reset_parameters(self) -> None:
        """Set to equal scores what was not loaded."""
        init.zeros_(self.keys)
        init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Score every expert: hidden [N, d] of any float type to fp32 [N, M]."""
        key_scores = F.linear(hidden.float(), self.keys.float().flatten(0, 1), self.bias.float().flatten())
        return key_scores.unflatten(-1, self.bias.shape).logsumexp(dim=-1)

    def inward(self) -> list[nn.Parameter]:
        """The parameters that multiply the hidden state itself, and so scale inversely with it."""
        return [self.keys]

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that distillation learns."""
        return list(self.parameters())


Router = LinearRouter | AttentionRouter

ROUTERS: dict[str, type[LinearRouter] | type[AttentionRouter]] = {
    "attention": AttentionRouter,
    "centroid": CentroidRouter,
    "linear": LinearRouter,
    "low_rank": LowRankRouter,
    "mlp": MlpRouter,
}
