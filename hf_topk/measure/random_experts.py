"""A conversion at random: experts, router and tail that cost what real ones do, for models with random weights."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_topk_experts import TopKExpertsConfig
from ..head import TopKExpertsHead
from ..modeling_topk_experts import TopKExpertsForCausalLM
from .shapes import WEIGHT_STD, norm_weight

STATES = 1024

# What a conversion chooses by itself, at every vocabulary from 8192 tokens on.
EXPERT_SIZE = 128
ALWAYS_ON = 256
LARGEST_SHARE_ALWAYS_ON = 1 / 32
ROUTER_RANK = 256
TAIL_RANK = 96
# On the bundled model of books (V = 32768) with tail `prior`, 4 experts of 128 and 256 always-on tokens are the fewest
# that hold 99.5 % agreement on held-out text (docs/fidelity.md), 5 the fewest that agree as often as FlashHead's method
# does, in 99.75 % (docs/frontier.md).
SHARE_OF_ROWS = 768 / 32768
SHARE_AS_FLASHHEAD = 896 / 32768
# Standard deviations of the logits of always-on and of all other tokens. With these a random model takes about as many
# dense passes a token, 0.09, as the model of books, which takes 0.10 and has 99 % of its drafts accepted.
ALWAYS_ON_LOGIT_STD = 5.2
OTHER_LOGIT_STD = 1.0
# Of the numbers in a row, large enough beside what the layers add that every token read gives another hidden state.
ROW_STD = 1.0


def config_at_random(text_config: PreTrainedConfig) -> TopKExpertsConfig:
    """The sizes that a conversion chooses by itself, and the share of rows that holds 99.5 % agreement.

    Args:
        text_config: of the dense model.
    """
    vocab_size = text_config.vocab_size
    always_on = min(ALWAYS_ON, int(vocab_size * LARGEST_SHARE_ALWAYS_ON))
    return TopKExpertsConfig(
        text_config=text_config,
        num_experts=math.ceil((vocab_size - always_on) / EXPERT_SIZE),
        expert_size=EXPERT_SIZE,
        num_experts_per_tok=experts_of_share(SHARE_OF_ROWS, vocab_size, always_on),
        num_always_on=always_on,
        router_type="mlp",
        router_rank=ROUTER_RANK,
        router_int8=True,
        tail="low_rank",
        tail_rank=TAIL_RANK,
    )


def experts_of_share(share: float, vocab_size: int, always_on: int) -> int:
    """How many experts are scored where a share of all rows is."""
    return max(1, math.ceil((share * vocab_size - always_on) / EXPERT_SIZE))


@torch.no_grad()
def convert_at_random(dense: PreTrainedModel, seed: int = 0) -> TopKExpertsForCausalLM:
    """Convert a dense model of random weights without looking at a hidden state.

    The experts are random, so that their rows lie scattered as they do after a conversion; so are router and tail, and
    the experts that are picked change with the hidden state. k is such that the share of rows scored is the one that
    holds 99.5 % agreement on the bundled model.

    A model of random weights has no likely tokens, and nothing could be drafted for it. So the rows of the always-on
    tokens are made longer, which lets one of them be the likeliest as often as a real model's likeliest token is
    scored. The last norm gets random signs, without which the tied head would repeat the token just read. None of this
    changes what a step costs.

    Args:
        dense: a model of [`random_model`]; its embeddings and its last norm are scaled.
        seed: of all random choices.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = dense.get_output_embeddings().weight
    vocab_size, hidden_size = weight.shape
    config = config_at_random(dense.config)
    config.router_int8 = False  # until it is filled
    model = TopKExpertsForCausalLM.from_dense(dense, config)
    _share_out(model.head, torch.randperm(vocab_size, generator=generator))
    _fill(model.head, generator)
    model.config.router_int8 = True
    weight *= ROW_STD / WEIGHT_STD
    weight[model.head.always_on_ids] *= ALWAYS_ON_LOGIT_STD / OTHER_LOGIT_STD
    _scramble_last_norm(dense, state_size(hidden_size), generator)
    return model


def random_states(head: TopKExpertsHead) -> Tensor:
    """Hidden states as large as those that enter the head of a model that was converted at random, [P, d]."""
    return (state_size(head.in_features) * torch.randn(STATES, head.in_features)).to(head.weight.dtype)


def state_size(hidden_size: int) -> float:
    """The root mean square of the states that enter the head of a model that was converted at random."""
    return OTHER_LOGIT_STD / (ROW_STD * math.sqrt(hidden_size))


def _share_out(head: TopKExpertsHead, order: Tensor) -> None:
    head.always_on_ids.copy_(order[: head.num_always_on].sort().values)
    routed = order[head.num_always_on :]
    missing = head.expert_ids.numel() - len(routed)
    short = routed[(len(routed) - 1) // head.expert_size * head.expert_size]
    slots = torch.cat([routed, short.expand(missing)]).view_as(head.expert_ids)
    head.expert_ids.copy_(torch.cat([slots[:-1].sort(dim=-1).values, slots[-1:]]))


def _fill(head: TopKExpertsHead, generator: torch.Generator) -> None:
    """Random router and tail: scores of the experts differ by about one, logits within an expert by less."""
    for module in (head.router, head.tail):
        for tensor in () if module is None else module.state_dict().values():
            if tensor.dtype == torch.uint8:
                tensor.random_(0, 256, generator=generator)
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
            else:
                tensor.zero_()
    head.router.to_int8(head.weight.dtype)
    for added in head.children():
        added.to(head.weight.dtype)


def _scramble_last_norm(dense: PreTrainedModel, factor: float, generator: torch.Generator) -> None:
    """Let the norm before the head multiply by `factor`, with random signs."""
    norm = dense.get_decoder().norm.weight
    signs = torch.randint(2, norm.shape, generator=generator).bool()
    norm.copy_(torch.where(signs, norm_weight(dense, factor), norm_weight(dense, -factor)))
