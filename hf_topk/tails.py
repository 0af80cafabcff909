"""Tails: how the probability of an expert that was not scored is shared out among its tokens."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .kernels import expert_packed_logits, packed_logits


class PriorTail(nn.Module):
    """A fixed prior: log p(v | e), the same at every position.

    Attributes:
        is_normalised: whether the probabilities of an expert's tokens sum to 1 as they are.
        log_prior: log p(v | e), [M, S].
    """

    is_normalised = True
    log_prior: Tensor

    def __init__(self, hidden_size: int, num_experts: int, expert_size: int, rank: int) -> None:
        """Make an empty tail.

        Args:
            hidden_size: not used by this kind.
            num_experts: M.
            expert_size: S.
            rank: not used by this kind.
        """
        super().__init__()
        self.register_buffer("log_prior", torch.empty(num_experts, expert_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make all tokens of an expert alike where nothing was loaded."""
        init.constant_(self.log_prior, -math.log(self.log_prior.shape[1]))

    def take_places(self, places: Tensor) -> None:
        """Move tokens: each place, [M, S], gets what stood at the one given, counted over all experts."""
        self.log_prior = self.log_prior.flatten()[places]

    def forward(self, hidden: Tensor) -> Tensor:
        """Log p(v | e, h) of every token in the order of the experts: [N, d] to fp32 [N, M, S]."""
        return self.log_prior.float().expand(hidden.shape[0], -1, -1)


class LowRankTail(nn.Module):
    """Logits within an expert from r numbers a token, a third of them kept in 4 bits, the others in 2.

    z_v = <f_v, B h - c> + bias_v, where f B is the data-weighted SVD of the rows of W less their expert's mean (the
    low-rank logits of SVD-softmax, Shim et al. 2017, https://arxiv.org/abs/1712.05159, with the SVD taken in the metric
    of the hidden states' covariance so that it minimises the error of the logits themselves). Each direction has one
    step for all tokens, which is part of B, and fewer bits where there is less to tell, as rate-distortion theory has
    it for independent components (reverse water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3).

    Attributes:
        is_normalised: whether the probabilities of an expert's tokens sum to 1 as they are.
    """

    is_normalised = False

    basis: Tensor
    center: Tensor
    codes_4bit: Tensor
    codes_2bit: Tensor
    bias: Tensor

    def __init__(self, hidden_size: int, num_experts: int, expert_size: int, rank: int) -> None:
        """Make an empty tail.

        Args:
            hidden_size: d.
            num_experts: M.
            expert_size: S.
            rank: r; a few directions more are kept where bytes would not be full.
        """
        super().__init__()
        bytes_4bit, bytes_2bit = -(-rank // 6), -(-(rank - rank // 3) // 4)
        self.directions_4bit, directions_2bit = 2 * bytes_4bit, 4 * bytes_2bit
        directions = self.directions_4bit + directions_2bit
        self.register_buffer("basis", torch.empty(directions, hidden_size))
        self.register_buffer("center", torch.empty(directions))
        self.register_buffer("codes_4bit", torch.empty(num_experts, expert_size, bytes_4bit, dtype=torch.uint8))
        self.register_buffer("codes_2bit", torch.empty(num_experts, expert_size, bytes_2bit, dtype=torch.uint8))
        self.register_buffer("bias", torch.empty(num_experts, expert_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make all tokens of an expert alike where nothing was loaded."""
        for buffer in self.buffers():
            init.zeros_(buffer)

    def take_places(self, places: Tensor) -> None:
        """Move tokens: each place, [M, S], gets what stood at the one given, counted over all experts."""
        self.codes_4bit = self.codes_4bit.flatten(0, 1)[places]
        self.codes_2bit = self.codes_2bit.flatten(0, 1)[places]
        self.bias = self.bias.flatten()[places]

    def forward(self, hidden: Tensor) -> Tensor:
        """Unnormalised log p(v | e, h) of every token in the order of the experts: [N, d] to fp32 [N, M, S]."""
        first, others = self._projected(hidden)
        logits = packed_logits(first, self.codes_4bit.flatten(0, 1), 4)
        logits = logits + packed_logits(others, self.codes_2bit.flatten(0, 1), 2)
        return logits.unflatten(-1, self.bias.shape) + self.bias.float()

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of hidden states in the directions of 4 and of 2 bits, fp32 [N, r] in all."""
        projected = F.linear(hidden.float(), self.basis.float(), -self.center.float())
        return projected[:, : self.directions_4bit], projected[:, self.directions_4bit :]


class ScreenTail(LowRankTail):
    """A low-rank approximation for the tokens of the picked experts, a fixed prior for all others.

    The picked experts' tokens are screened with it: exact logits are computed for the likeliest of them alone, and the
    rest keep what the screen says. (Screening by low-bit codes before exact scores: Guo et al. 2020,
    https://arxiv.org/abs/1908.10396.)

    Attributes:
        log_prior: log p(v | e) where the expert was not picked, [M, S].
    """

    log_prior: Tensor

    def __init__(self, hidden_size: int, num_experts: int, expert_size: int, rank: int) -> None:
        """Make an empty tail.

        Args:
            hidden_size: d.
            num_experts: M.
            expert_size: S.
            rank: r; a few directions more are kept where bytes would not be full.
        """
        super().__init__(hidden_size, num_experts, expert_size, rank)
        self.register_buffer("log_prior", torch.empty(num_experts, expert_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make all tokens of an expert alike where nothing was loaded."""
        super().reset_parameters()
        if hasattr(self, "log_prior"):  # the parent's constructor asks first
            init.constant_(self.log_prior, -math.log(self.log_prior.shape[1]))

    def take_places(self, places: Tensor) -> None:
        """Move tokens: each place, [M, S], gets what stood at the one given, counted over all experts."""
        super().take_places(places)
        self.log_prior = self.log_prior.flatten()[places]

    def screen(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """Unnormalised log p(v | e, h) of the tokens of picked experts: [N, d] and [N, k] to fp32 [N, k, S]."""
        first, others = self._projected(hidden)
        logits = expert_packed_logits(first, self.codes_4bit, 4, experts)
        logits = logits + expert_packed_logits(others, self.codes_2bit, 2, experts)
        return logits + self.bias[experts].float()

    def read_by_expert(self) -> tuple[Tensor, ...]:
        """Tensors [M, ...] of which the rows of the picked experts alone are read."""
        return self.codes_4bit, self.codes_2bit, self.bias

    def read_always(self) -> tuple[Tensor, ...]:
        """Tensors that are read at every position."""
        return self.basis, self.center, self.log_prior


Tail = PriorTail | LowRankTail

TAILS: dict[str, type[PriorTail] | type[LowRankTail]] = {
    "low_rank": LowRankTail,
    "prior": PriorTail,
    "screen": ScreenTail,
}
