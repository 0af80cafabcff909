"""The second half of the always-on tokens: those that routing misses."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from hf_topk.head import TopKExpertsHead
from hf_topk.progress import progress

STATES_AT_ONCE = 1024
# A token counts as missed if its expert is not among so many. More experts miss too few tokens to choose from.
EXPERTS_SCORED = 2


@torch.no_grad()
def swap_in_missed(
    head: TopKExpertsHead, states: Tensor, best: Tensor, probabilities: Tensor, reserved: Tensor
) -> list[int]:
    """Make the tokens that routing misses always-on, in places that were kept for them.

    The tokens that change places are few, and those that go into experts hardly ever matter; each goes where a missed
    one was, near rows to near rows.

    Args:
        head: with a distilled router; its ids are set in place.
        states: hidden states of the sample, [N, d].
        best: the expert of the dense argmax of each, M if it is always on, int64 [N].
        probabilities: mean probability of each token over the sample, [V].
        reserved: always-on tokens that only keep a place, int64 [places].

    Returns:
        The experts that have changed.
    """
    if not len(reserved):
        return []
    missed = _most_missed(head, states, best, probabilities, len(reserved))
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
    return changed.tolist()


def _most_missed(head: TopKExpertsHead, states: Tensor, best: Tensor, probabilities: Tensor, count: int) -> Tensor:
    """The tokens that most often are the dense argmax while their expert is not scored, then the likeliest: [count]."""
    misses = torch.zeros(head.out_features, dtype=torch.long, device=head.expert_ids.device)
    for expert, missed in _missed_states(head, states, best):
        ids = head.expert_ids[expert]
        bias = None if head.bias is None else head.bias[ids]
        misses += ids[F.linear(missed, head.weight[ids], bias).argmax(dim=-1)].bincount(minlength=len(misses))
    ids = head.expert_ids
    is_whole = (ids[:, 1:] != ids[:, :1]).all(dim=-1)  # a short expert keeps its tokens
    may_go = torch.zeros_like(misses, dtype=torch.bool)
    may_go[ids[is_whole]] = True
    rank = (misses + probabilities / 2).masked_fill(~may_go, -1)  # probabilities are at most 1
    return rank.topk(min(count, int(may_go.sum()))).indices


def _missed_states(head: TopKExpertsHead, states: Tensor, best: Tensor) -> list[tuple[int, Tensor]]:
    """The states whose dense argmax is not scored, expert by expert."""
    missed = []
    with progress("Looking for missed tokens", len(states), "positions") as advance:
        for some, expert in zip(states.split(STATES_AT_ONCE), best.split(STATES_AT_ONCE), strict=True):
            scored = head.router(some.to(head.weight)).topk(min(EXPERTS_SCORED, head.num_experts), dim=-1).indices.cpu()
            missed.append((expert < head.num_experts) & (expert.unsqueeze(-1) != scored).all(dim=-1))
            advance(len(some))
    where = torch.cat(missed).nonzero().squeeze(-1)
    return [(int(expert), states[where[best[where] == expert]].to(head.weight)) for expert in best[where].unique()]
