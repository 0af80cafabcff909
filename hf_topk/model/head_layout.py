"""The layout of token ids in experts, and how it follows changes of the vocabulary."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_topk_experts import TopKExpertsConfig
from .errors import InputError
from .head_sizes import SizedHead
from .whole_head import full_shape


def check_sizes(config: TopKExpertsConfig, vocab_size: int) -> None:
    """Check that experts and always-on tokens cover a vocabulary.

    Args:
        config: the converted model's configuration.
        vocab_size: V.

    Raises:
        InputError: when they do not, or there is no token to route.
    """
    if config.num_always_on >= vocab_size:
        raise InputError(f"num_always_on is {config.num_always_on}, which leaves none of {vocab_size} tokens to route")
    slots = config.num_experts * config.expert_size
    if slots + config.num_always_on < vocab_size:
        raise InputError(
            f"{config.num_experts} experts of {config.expert_size} and {config.num_always_on} always-on tokens do not "
            f"cover a vocabulary of {vocab_size}: raise num_experts or expert_size"
        )


def places_left(expert_ids: Tensor, vocab_size: int) -> Tensor:
    """For each place [M, S], the place of the token to move there once ids of `vocab_size` and above are removed.

    Remaining tokens of an expert move to its front. The rest of its places repeat the first of them, or the first
    remaining token of all experts if none is left.
    """
    gone = expert_ids >= vocab_size
    order = gone.int().argsort(dim=-1, stable=True)  # remaining tokens first
    places = torch.arange(gone.numel(), device=gone.device).view_as(gone).gather(1, order)
    gone = gone.gather(1, order)
    first = torch.where(gone[:, :1], places[~gone][0], places[:, :1])
    return torch.where(gone, first, places)


class LaidOutHead(SizedHead):
    """A dense head whose token ids are split into experts and always-on tokens.

    Attributes:
        always_on_ids: token ids scored at every position, [A] int64.
        expert_ids: token ids of each expert, [M, S] int64; a short expert repeats its first id.
    """

    def _reset_ids(self) -> None:
        ids = torch.arange(self.out_features, device=self.expert_ids.device)
        init.copy_(self.always_on_ids, ids[: self.num_always_on])
        slots = ids[self.num_always_on :][: self.expert_ids.numel()]
        first_of_last = slots[(len(slots) - 1) // self.expert_size * self.expert_size]
        padding = first_of_last.expand(self.expert_ids.numel() - len(slots))
        init.copy_(self.expert_ids, torch.cat([slots, padding]).view_as(self.expert_ids))

    def places_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the places of tokens.

        Args:
            tokens: ids, of any shape.

        Returns:
            Indices into the always-on tokens, and into the flattened `expert_ids`; -1 where a token is not among them.
        """
        always, routed = torch.full((2, self.out_features), -1, device=tokens.device)
        always[self.always_on_ids] = torch.arange(self.num_always_on, device=tokens.device)
        places = torch.arange(self.expert_ids.numel(), device=tokens.device)
        # Of repeated ids the first.
        routed.scatter_reduce_(0, self.expert_ids.flatten(), places, "amin", include_self=False)
        return always[tokens], routed[tokens]

    def scored_ids(self, experts: Tensor) -> Tensor:
        """Token ids scored when `experts` are picked: [N, k] to [N, A + k S]."""
        always = self.always_on_ids.expand(experts.shape[0], -1)
        return torch.cat([always, self.expert_ids[experts].flatten(1)], dim=-1)

    @property
    def has_short_experts(self) -> bool:
        """Whether some expert has fewer than S tokens, and repeats its first id."""
        return self.expert_ids.numel() != self.out_features - self.num_always_on

    def mask_padding(self, values: Tensor, ids: Tensor) -> Tensor:
        """Set values of repeated ids in short experts to -inf: values and ids [..., S]."""
        if not self.has_short_experts:
            return values
        repeats = ids == ids[..., :1]
        repeats = torch.cat([torch.zeros_like(repeats[..., :1]), repeats[..., 1:]], dim=-1)
        return values.masked_fill(repeats, -torch.inf)

    @torch.no_grad()
    def take_over(self, resized: nn.Linear) -> None:
        """Take the weight and bias of a head with more or fewer rows.

        New tokens become always-on; the places of removed tokens repeat a remaining id.

        Args:
            resized: a linear layer of the same hidden size.

        Raises:
            InputError: when it has no row of any routed token.
        """
        vocab_size = full_shape(resized.weight)[0]
        if not (self.expert_ids < vocab_size).any():
            raise InputError(f"a head of {vocab_size} rows leaves no token to route: keep more of them")
        # With tied embeddings, Transformers has already changed `out_features`, so new tokens are found by the ids.
        known = int(torch.cat([self.always_on_ids, self.expert_ids.flatten()]).max()) + 1
        added = torch.arange(known, max(vocab_size, known), device=self.always_on_ids.device)
        kept = self.always_on_ids[self.always_on_ids < vocab_size]
        self.always_on_ids = torch.cat([kept, added])
        places = places_left(self.expert_ids, vocab_size)
        self.expert_ids = self.expert_ids.flatten()[places]
        self.tail.take_places(places)
        self.weight, self.bias, self.out_features = resized.weight, resized.bias, vocab_size
