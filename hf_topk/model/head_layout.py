"""How token ids are laid out in experts, and what becomes of them when the vocabulary changes."""

import torch
from torch import Tensor

from .configuration_topk_experts import TopKExpertsConfig
from .errors import InputError


def check_sizes(config: TopKExpertsConfig, vocab_size: int) -> None:
    """Check that experts and always-on tokens have room for a vocabulary.

    Args:
        config: the converted model's configuration.
        vocab_size: V.

    Raises:
        InputError: when they are not enough, or there is nothing to route.
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
    """Where each place takes its token from once ids of `vocab_size` and above are gone, counted over all experts.

    Places of tokens that are gone repeat one that is left, put first: of the same expert where there is one.
    """
    gone = expert_ids >= vocab_size
    order = gone.int().argsort(dim=-1, stable=True)  # tokens that are left come first
    places = torch.arange(gone.numel(), device=gone.device).view_as(gone).gather(1, order)
    gone = gone.gather(1, order)
    first = torch.where(gone[:, :1], places[~gone][0], places[:, :1])
    return torch.where(gone, first, places)
