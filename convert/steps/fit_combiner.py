"""Fits the combiner, which joins the router's scores with the exact logits."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_topk.model.head import TopKExpertsHead
from hf_topk.progress import progress

COMBINER_STEPS = 200
COMBINER_BATCH = 32
COMBINER_LEARNING_RATE = 0.02


def fit_combiner(head: TopKExpertsHead, states: Tensor, seed: int) -> None:
    """Distil the combiner by the KL divergence from the dense distribution.

    Args:
        head: its combiner is trained in place; a head without one is left alone.
        states: hidden states, [N, d].
        seed: of the random batches.
    """
    if head.combine != "learned":
        return
    generator = torch.Generator().manual_seed(seed)
    head.requires_grad_(False)
    parameters = list(head.combiner.requires_grad_().parameters())
    optimizer = torch.optim.Adam(parameters, lr=COMBINER_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, COMBINER_STEPS)
    with torch.enable_grad(), progress("Distilling the combiner", COMBINER_STEPS, "steps") as advance:
        for _ in range(COMBINER_STEPS):
            chosen = torch.randint(states.shape[0], (COMBINER_BATCH,), generator=generator)
            hidden = states[chosen].to(head.weight)
            dense = F.linear(hidden, head.weight, head.full_bias).float().log_softmax(-1)
            sparse = head.sparse_logits(hidden).float().log_softmax(-1)
            F.kl_div(sparse, dense, log_target=True, reduction="batchmean").backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance()
