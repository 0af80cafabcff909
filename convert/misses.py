"""The second half of the always-on tokens: those that routing misses."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from hf_topk.head import LOGITS_AT_ONCE, TopKExpertsHead
from hf_topk.progress import progress

from .distill import evenly_spaced

STATES_LOOKED_AT = 1 << 16
# A token counts as missed if its expert is not among so many. More experts miss too few tokens to choose from.
EXPERTS_SCORED = 2


@torch.no_grad()
def swap_in_missed(head: TopKExpertsHead, states: Tensor, probabilities: Tensor, reserved: Tensor) -> None:
    """Make the tokens that routing misses always-on, in places that were kept for them.

    The router stays as it was distilled: the tokens that change places are few, and those that go into experts hardly
    ever matter; each goes where a missed one was, near rows to near rows.

    Args:
        head: with a distilled router; its ids are set in place.
        states: hidden states of the sample, [N, d].
        probabilities: mean probability of each token over the sample, [V].
        reserved: always-on tokens that only keep a place, int64 [places].
    """
    if not len(reserved):
        return
    missed = _most_missed(head, states, probabilities, len(reserved))
    always_on = head.always_on_ids
    given_up = reserved[: len(missed)].to(always_on.device)
    slots = torch.full((head.out_features,), -1, device=always_on.device)
    slots[head.expert_ids.flatten()] = torch.arange(head.expert_ids.numel(), device=always_on.device)
    slots = slots[missed]
    experts = slots // head.expert_size
    centres = torch.stack([head.weight[ids].float().mean(dim=0) for ids in head.expert_ids[experts]])
    which, where = linear_sum_assignment(torch.cdist(head.weight[given_up].float(), centres).square().cpu().numpy())
    head.expert_ids.view(-1)[slots[where]] = given_up[which]
    changed = experts.unique()
    head.expert_ids[changed] = head.expert_ids[changed].sort(dim=-1).values
    is_kept = ~torch.isin(always_on, given_up)
    head.always_on_ids.copy_(torch.cat([always_on[is_kept], missed]).sort().values)


def _most_missed(head: TopKExpertsHead, states: Tensor, probabilities: Tensor, count: int) -> Tensor:
    """The tokens that most often are the dense argmax while their expert is not scored, then the likeliest: [count]."""
    expert_of = torch.full((head.out_features,), -1, device=head.expert_ids.device)
    expert_of[head.expert_ids] = torch.arange(head.num_experts, device=expert_of.device).unsqueeze(-1)
    misses = torch.zeros(head.out_features, dtype=torch.long, device=expert_of.device)
    sample = evenly_spaced(states, STATES_LOOKED_AT)
    with progress("Looking for missed tokens", len(sample), "positions") as advance:
        for some in sample.split(max(1, LOGITS_AT_ONCE // head.out_features)):
            some = some.to(head.weight)
            best = F.linear(some, head.weight, head.bias).argmax(dim=-1)
            scored = head.router(some).topk(min(EXPERTS_SCORED, head.num_experts), dim=-1).indices
            is_missed = (expert_of[best].unsqueeze(-1) != scored).all(dim=-1)
            misses += best[is_missed].bincount(minlength=head.out_features)
            advance(len(some))
    ids = head.expert_ids
    is_whole = (ids[:, 1:] != ids[:, :1]).all(dim=-1)  # a short expert keeps its tokens
    may_go = torch.zeros(head.out_features, dtype=torch.bool, device=expert_of.device)
    may_go[ids[is_whole]] = True
    rank = (misses + probabilities / 2).masked_fill(~may_go, -1)  # probabilities are at most 1
    return rank.topk(min(count, int(may_go.sum()))).indices
