"""A conversion at random: experts, router and tail that cost what real ones do, for models with random weights."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.configuration_topk_experts import TopKExpertsConfig
from ..model.head import TopKExpertsHead
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..model.packed_rows import PackedRows
from .shapes import WEIGHT_STD, norm_weight

STATES = 1024

# What holds 99.5 % agreement on a real head: for that of SmolLM2-135M-Instruct, conversion with its default sample
# chose 458 of the 3056 experts and exact logits for 527 of their tokens.
SHARE_OF_EXPERTS = 0.15
NUM_RESCORED = 512
# Standard deviations of the logits of always-on and of all other tokens. With these nearly all drafts are accepted, and
# a random model takes 0.09 dense passes a token.
ALWAYS_ON_LOGIT_STD = 5.2
OTHER_LOGIT_STD = 1.0
# Standard deviations of the experts' scores, and of the screen's logits within an expert.
SCORE_STD, SCREEN_STD = 1.0, 0.5
MEAN_SQUARE_OF_INT8 = 127 * 128 / 3  # of random numbers from -127 to 127
# Of the numbers in a row, large enough beside what the layers add that every token read gives another hidden state.
ROW_STD = 1.0


def config_at_random(text_config: PreTrainedConfig) -> TopKExpertsConfig:
    """The sizes that a conversion has by default, and as many experts and exact logits as hold 99.5 % agreement.

    Args:
        text_config: of the dense model.
    """
    from ..convert.recipe import Recipe  # not above: what converts imports what measures

    vocab_size = text_config.vocab_size
    recipe = Recipe().resolve(vocab_size)
    num_experts_per_tok = max(1, round(SHARE_OF_EXPERTS * recipe.num_experts))
    return TopKExpertsConfig(
        text_config=text_config,
        num_experts=recipe.num_experts,
        expert_size=recipe.expert_size,
        num_experts_per_tok=num_experts_per_tok,
        num_always_on=recipe.num_always_on,
        router_rank=recipe.router_rank,
        router_packed=True,
        tail_rank=recipe.tail_rank,
        num_rescored=min(NUM_RESCORED, num_experts_per_tok * recipe.expert_size),
    )


@torch.no_grad()
def convert_at_random(dense: PreTrainedModel, seed: int = 0) -> TopKExpertsForCausalLM:
    """Convert a dense model of random weights without looking at a hidden state.

    The experts are random, so that their rows lie scattered as they do after a conversion; so are router and tail, and
    the experts that are picked and the tokens that are rescored change with the hidden state.

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
    model = TopKExpertsForCausalLM.from_dense(dense, config_at_random(dense.config))
    _share_out(model.head, torch.randperm(vocab_size, generator=generator))
    for rows, deviation in ((model.head.router, SCORE_STD), (model.head.tail, SCREEN_STD)):
        _fill(rows, deviation, generator)
        rows.to(weight.dtype)
    weight *= ROW_STD / WEIGHT_STD
    weight[model.head.always_on_ids] *= ALWAYS_ON_LOGIT_STD / OTHER_LOGIT_STD
    _scramble_last_norm(dense, state_size(hidden_size), generator)
    return model


def random_states(head: TopKExpertsHead) -> Tensor:
    """Hidden states as large as those that enter the head of a model that was converted at random, [P, d]."""
    return (state_size(head.in_features) * torch.randn(STATES, head.in_features)).to(head.weight)


def state_size(hidden_size: int) -> float:
    """The root mean square of the states that enter the head of a model that was converted at random."""
    return OTHER_LOGIT_STD / (ROW_STD * math.sqrt(hidden_size))


def _share_out(head: TopKExpertsHead, order: Tensor) -> None:
    """Share out the tokens in a random order; there are as many always-on ones as let the experts come out even."""
    always_on, routed = order[: head.num_always_on], order[head.num_always_on :]
    head.always_on_ids.copy_(always_on.sort().values)
    head.expert_ids.copy_(routed.view_as(head.expert_ids).sort(dim=-1).values)


def _fill(packed: PackedRows, deviation: float, generator: torch.Generator) -> None:
    """Random codes in random directions, each with the same share in the products.

    Args:
        packed: of which all else is zero.
        deviation: of the products of the rows with one of the hidden states, over the rows.
        generator: of what is random.
    """
    packed.codes_4bit.random_(0, 256, generator=generator)
    packed.codes_2bit.random_(0, 256, generator=generator)
    packed.basis.random_(-127, 128, generator=generator)
    variance_of_codes = (4.0**packed.bits - 1) / 12
    state_norm = OTHER_LOGIT_STD / ROW_STD
    sizes = (variance_of_codes * MEAN_SQUARE_OF_INT8 * len(packed.basis)).sqrt()
    packed.basis_scales.copy_(deviation / state_norm / sizes)


def _scramble_last_norm(dense: PreTrainedModel, factor: float, generator: torch.Generator) -> None:
    """Let the norm before the head multiply by `factor`, with random signs."""
    norm = dense.get_decoder().norm.weight
    signs = torch.randint(2, norm.shape, generator=generator).bool()
    norm.copy_(torch.where(signs, norm_weight(dense, factor), norm_weight(dense, -factor)))
