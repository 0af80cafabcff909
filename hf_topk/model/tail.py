"""The tail: how the probability of an expert is shared out among those of its tokens that get no exact logit."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import initialization as init

from .packed_rows import PackedRows


class Tail(PackedRows):
    """A screen of few bits a token for the picked experts, a fixed prior for all others.

    The picked experts' tokens are screened: exact logits are computed for the likeliest of them alone, and the rest
    keep what the screen says (low-rank logits before exact ones: SVD-softmax, Shim et al. 2017,
    https://arxiv.org/abs/1712.05159).

    Attributes:
        bias: of the screen, [M, S].
        log_prior: log p(v | e) where the expert was not picked, [M, S].
    """

    bias: Tensor
    log_prior: Tensor

    def __init__(self, hidden_size: int, num_experts: int, expert_size: int, rank: int) -> None:
        """Make a tail to which all tokens of an expert are alike.

        Args:
            hidden_size: d.
            num_experts: M.
            expert_size: S.
            rank: r, numbers kept of a token's row.
        """
        super().__init__(hidden_size, (num_experts, expert_size), rank)
        self.register_buffer("bias", torch.empty(num_experts, expert_size))
        self.register_buffer("log_prior", torch.empty(num_experts, expert_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make all tokens of an expert alike where nothing was loaded."""
        super().reset_parameters()
        init.constant_(self.log_prior, -math.log(self.log_prior.shape[1]))

    def take_places(self, places: Tensor) -> None:
        """Move tokens: each place, [M, S], gets what stood at the one given, counted over all experts."""
        self.codes_4bit = self.codes_4bit.flatten(0, 1)[places]
        self.codes_2bit = self.codes_2bit.flatten(0, 1)[places]
        self.bias, self.log_prior = self.bias.flatten()[places], self.log_prior.flatten()[places]

    def screen(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """Unnormalised log p(v | e, h) of the tokens of picked experts: [N, d] and [N, k] to fp32 [N, k, S]."""
        return self.products_of(hidden, experts) + F.embedding(experts, self.bias).float()

    def read_by_expert(self) -> tuple[Tensor, ...]:
        """Tensors [M, ...] of which the rows of the picked experts alone are read."""
        return self.codes_4bit, self.codes_2bit, self.bias

    def read_always(self) -> tuple[Tensor, ...]:
        """Tensors that are read at every position."""
        return self.basis, self.basis_scales, self.center, self.log_prior
