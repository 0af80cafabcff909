"""The router: a score for each expert from a hidden state."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .packed_rows import PackedRows


class Router(PackedRows):
    """A linear layer with a row per expert: score e estimates the log-sum-exp of the dense logits of expert e.

    The rows are floats in training, and are packed into few bits afterwards.

    Attributes:
        rows: one per expert, [M, d], or None once they are packed.
        level: the common part of all rows once they are packed, [d].
        bias: added to the scores, [M].
    """

    rows: nn.Parameter | None
    bias: nn.Parameter
    level: Tensor

    def __init__(self, hidden_size: int, num_experts: int, rank: int, is_packed: bool = False) -> None:
        """Make a router that gives all experts the same score.

        Args:
            hidden_size: d.
            num_experts: M.
            rank: r, numbers kept per row once it is packed.
            is_packed: whether it holds packed rows.
        """
        super().__init__(hidden_size, (num_experts,), rank)
        self.register_buffer("level", torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.rows = None if is_packed else nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def forward(self, hidden: Tensor, with_level: bool = True) -> Tensor:
        """Score every expert.

        Args:
            hidden: [N, d] of any float type.
            with_level: whether to add the common part of all rows; without it scores lack a constant per position, and
                are cheaper.

        Returns:
            Scores, fp32 [N, M].
        """
        if self.rows is not None:
            return F.linear(hidden.float(), self.rows.float()) + self.bias
        scores = self.products(hidden)
        return scores + F.linear(hidden.float(), self.level.float().unsqueeze(0)) if with_level else scores

    @property
    def floats(self) -> nn.Parameter:
        """The float rows of a router that is not packed, [M, d]."""
        if self.rows is None:
            raise ValueError("the router is packed: unpack it first")
        return self.rows

    @torch.no_grad()
    def pack(self, coordinates: Tensor | None = None, mean: Tensor | None = None) -> None:
        """Replace the rows by codes in the current basis; they cannot be trained then.

        Args:
            coordinates: of the rows less their mean row, in steps, [M, r]; by least squares if None.
            mean: a hidden state at which no score changes, [d], or None.
        """
        if self.rows is None:
            return
        rows, basis = self.rows.float(), self.float_basis()
        mean_row = rows.mean(dim=0)
        if coordinates is None:
            coordinates = (rows - mean_row) @ torch.linalg.pinv(basis)
        self.set_codes(slice(None), coordinates)
        codes = self.coordinates()
        self.level.copy_(mean_row - codes.mean(dim=0) @ basis)  # so that rounding does not move the mean row
        bias = self.bias.float() + codes @ self.center.float()
        self.bias.copy_(bias if mean is None else bias + (rows - codes @ basis - self.level.float()) @ mean)
        self.rows = None

    @torch.no_grad()
    def unpack(self) -> None:
        """Replace the codes by float rows, in the dtype of the bias, so that they can be trained."""
        if self.rows is not None:
            return
        codes = self.coordinates()
        rows = codes @ self.float_basis() + self.level.float()
        self.bias.copy_(self.bias.float() - codes @ self.center.float())
        self.rows = nn.Parameter(rows.to(self.bias.dtype))
