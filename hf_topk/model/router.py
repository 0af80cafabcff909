"""The router: from a hidden state to a score for each expert."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .packed_rows import PackedRows


class Router(PackedRows):
    """One row an expert: score e estimates the log-sum-exp of the dense logits of expert e.

    The rows are floats while they are learned, and few bits each from then on.

    Attributes:
        rows: one an expert, [M, d], or None once they are packed.
        level: what all rows have in common once they are packed, [d].
        bias: added to the scores, [M].
    """

    rows: nn.Parameter | None
    bias: nn.Parameter
    level: Tensor

    def __init__(self, hidden_size: int, num_experts: int, rank: int, is_packed: bool = False) -> None:
        """Make a router that scores all experts alike.

        Args:
            hidden_size: d.
            num_experts: M.
            rank: r, numbers kept of a row once it is packed.
            is_packed: whether it is to hold packed rows.
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
            with_level: whether to add what all experts have in common; without it scores are right up to a number for
                each position, and take less.

        Returns:
            Scores, fp32 [N, M].
        """
        if self.rows is not None:
            return F.linear(hidden.float(), self.rows.float()) + self.bias
        scores = self.products(hidden) + self.bias.float()
        return scores + F.linear(hidden.float(), self.level.float().unsqueeze(0)) if with_level else scores

    @property
    def floats(self) -> nn.Parameter:
        """The rows of a router that is not packed, [M, d]."""
        if self.rows is None:
            raise ValueError("the router is packed: unpack it first")
        return self.rows

    @torch.no_grad()
    def pack(self, coordinates: Tensor | None = None, mean: Tensor | None = None) -> None:
        """Keep the rows as codes in the present basis from now on; they cannot be trained then.

        Args:
            coordinates: of the rows less their mean row, in steps, [M, r]; those of least squares if None.
            mean: a hidden state at which no score is to change, [d], or None.
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
        """Keep the rows as floats, of the type of the bias, from now on, so that they can be trained."""
        if self.rows is not None:
            return
        codes = self.coordinates()
        rows = codes @ self.float_basis() + self.level.float()
        self.bias.copy_(self.bias.float() - codes @ self.center.float())
        self.rows = nn.Parameter(rows.to(self.bias.dtype))
