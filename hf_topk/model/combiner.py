"""The learned combiner, which interpolates between exact logits and the router's estimates."""

import torch
from torch import Tensor, nn
from transformers import initialization as init


class LearnedCombiner(nn.Module):
    """A gate and two shifts per expert, distilled, that move exact logits towards the router's estimate."""

    def __init__(self, num_experts: int) -> None:
        """Make a combiner that changes nothing yet.

        Args:
            num_experts: M.
        """
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts))
        self.shift = nn.Parameter(torch.empty(num_experts))
        self.tail_shift = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set parameters that were not loaded to change nothing."""
        for parameter in self.parameters():
            init.zeros_(parameter)

    def forward(self, scores: Tensor, top: Tensor, disagreement: Tensor) -> tuple[Tensor, Tensor]:
        """Combine aligned scores with exact logits.

        Args:
            scores: the router's scores, aligned with the exact masses, fp32 [N, M].
            top: the picked experts, [N, k].
            disagreement: aligned score less exact mass of the picked experts, fp32 [N, k].

        Returns:
            Shifts of the exact logits of each picked expert, [N, k], and the scores for the tail, [N, M].
        """
        shifts = self.gate.float()[top] * disagreement + self.shift.float()[top]
        return shifts, scores + self.tail_shift.float()
