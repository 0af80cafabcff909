"""The tail: the split of an expert's probability among its tokens without an exact logit."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import initialization as init

from .kernels import expert_int8_products, runs_on_triton
from .packed_rows import PackedRows


class Tail(PackedRows):
    """A low-bit screen for tokens of the picked experts, a fixed prior for all others.

    The screen estimates the logits of the picked experts' tokens. Only the likeliest of them get exact logits, and the
    rest keep the estimate (low-rank logits before exact ones: Shim, Lee, Choi, Boo and Sung, "SVD-Softmax: Fast Softmax
    Approximation on Large Vocabulary Neural Networks", NIPS 2017, pages 5463 to 5473).

    Attributes:
        bias: of the screen, [M, S].
        log_prior: log p(v | e) of experts that are not picked, [M, S].
    """

    bias: Tensor
    log_prior: Tensor

    def __init__(self, hidden_size: int, num_experts: int, expert_size: int, rank: int) -> None:
        """Make a tail in which all tokens of an expert are equally likely.

        Args:
            hidden_size: d.
            num_experts: M.
            expert_size: S.
            rank: r, numbers kept per token.
        """
        super().__init__(hidden_size, (num_experts, expert_size), rank)
        self.register_buffer("bias", torch.empty(num_experts, expert_size))
        self.register_buffer("log_prior", torch.empty(num_experts, expert_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the tokens of an expert equally likely, in tensors that were not loaded."""
        super().reset_parameters()
        init.constant_(self.log_prior, -math.log(self.log_prior.shape[1]))

    def take_places(self, places: Tensor) -> None:
        """Move tokens to new places.

        Args:
            places: for each place, the old place of its token, over all experts, [M, S].
        """
        self.codes_4bit = self.codes_4bit.flatten(0, 1)[places]
        self.codes_2bit = self.codes_2bit.flatten(0, 1)[places]
        self.bias, self.log_prior = self.bias.flatten()[places], self.log_prior.flatten()[places]

    def screen(self, hidden: Tensor, experts: Tensor) -> Tensor:
        """Unnormalised log p(v | e, h) of the tokens of picked experts: [N, d] and [N, k] to fp32 [N, k, S]."""
        if runs_on_triton(hidden, self.codes_4bit):
            return self._packed_products(hidden, experts) + F.embedding(experts, self.bias).float()
        prepared = self._prepared()
        projected, bias = self._projected(hidden, prepared), self._float_bias(prepared)
        products = expert_int8_products(projected, prepared.words, experts, prepared.ones)
        # For one position a copy of rows takes half of the time.
        return products + (bias.index_select(0, experts[0]) if len(experts) == 1 else F.embedding(experts, bias))

    def read_by_expert(self) -> tuple[Tensor, ...]:
        """Tensors [M, ...] of which only the rows of the picked experts are read."""
        return self.codes_4bit, self.codes_2bit, self.bias

    def read_always(self) -> tuple[Tensor, ...]:
        """Tensors that are read completely at every position."""
        return self.basis, self.basis_scales, self.center, self.log_prior
