"""Random experts, router and tail with the cost of real ones, for models with random weights."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.configuration_topk_experts import TopKExpertsConfig
from ..model.encoder_decoder import converted_class
from ..model.head import TopKExpertsHead
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..model.packed_rows import PackedRows
from .shapes import WEIGHT_STD, norm_weight

STATES = 1024

# The operating point of a real head at 99.5 % agreement: for SmolLM2-135M-Instruct and the default calibration text,
# conversion chose 346 of 3056 experts and 458 exact logits.
SHARE_OF_EXPERTS = 0.11
NUM_RESCORED = 512
# Standard deviations of the logits of always-on and of all other tokens. With these nearly all draft tokens are
# accepted: a random model takes 0.09 verification passes per token.
ALWAYS_ON_LOGIT_STD = 5.2
OTHER_LOGIT_STD = 1.0
# Standard deviations of the experts' scores, and of the screen's logits within an expert.
SCORE_STD, SCREEN_STD = 1.0, 0.5
MEAN_SQUARE_OF_INT8 = 127 * 128 / 3  # uniform from -127 to 127
# Of the elements of a row; large enough relative to the layers' output that each input token changes the hidden state.
ROW_STD = 1.0


def config_at_random(text_config: PreTrainedConfig) -> TopKExpertsConfig:
    """The default sizes of a conversion, with the k and R of a real head at 99.5 % agreement.

    Args:
        text_config: of the dense model.
    """
    from ..convert.recipe import ROUTER_RANK, TAIL_RANK, Recipe  # here, as the package loads without the converter

    vocab_size = text_config.vocab_size
    recipe = Recipe().resolve(vocab_size)
    num_experts_per_tok = max(1, round(SHARE_OF_EXPERTS * recipe.num_experts))
    return TopKExpertsConfig(
        text_config=text_config,
        num_experts=recipe.num_experts,
        expert_size=recipe.expert_size,
        num_experts_per_tok=num_experts_per_tok,
        num_always_on=recipe.num_always_on,
        router_rank=ROUTER_RANK,
        router_packed=True,
        tail_rank=TAIL_RANK,
        num_rescored=min(NUM_RESCORED, num_experts_per_tok * recipe.expert_size),
    )


@torch.no_grad()
def convert_at_random(dense: PreTrainedModel, seed: int = 0) -> TopKExpertsForCausalLM:
    """Convert a dense model with random weights, without any hidden states.

    Experts, router and tail are random: rows are scattered in memory as after a real conversion, and the picked experts
    and rescored tokens vary with the hidden state.

    Random weights have no likely tokens, so no draft token would be accepted. The rows of the always-on tokens are
    scaled up until one of them is the argmax as often as a real model's argmax is scored. The final norm gets random
    signs, as the tied head would otherwise repeat the last token. None of this changes the cost of a step.

    Args:
        dense: a model of [`random_model`]; its embeddings and its final norm are scaled.
        seed: of all random choices.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = dense.get_output_embeddings().weight
    vocab_size, hidden_size = weight.shape
    model = converted_class(dense.config).from_dense(dense, config_at_random(dense.config))
    _partition(model.head, torch.randperm(vocab_size, generator=generator))
    for rows, deviation in ((model.head.router, SCORE_STD), (model.head.tail, SCREEN_STD)):
        _fill(rows, deviation, generator)
        rows.to(weight.dtype)
    weight *= ROW_STD / WEIGHT_STD
    weight[model.head.always_on_ids] *= ALWAYS_ON_LOGIT_STD / OTHER_LOGIT_STD
    _scramble_last_norm(dense, state_size(hidden_size), generator)
    return model


def random_states(head: TopKExpertsHead) -> Tensor:
    """Hidden states of the scale that the head of such a model receives, [P, d]."""
    return (state_size(head.in_features) * torch.randn(STATES, head.in_features)).to(head.weight)


def state_size(hidden_size: int) -> float:
    """Root mean square of the hidden states of such a model."""
    return OTHER_LOGIT_STD / (ROW_STD * math.sqrt(hidden_size))


def _partition(head: TopKExpertsHead, order: Tensor) -> None:
    """Assign the tokens in the given order; the default number of always-on tokens leaves no expert incomplete."""
    always_on, routed = order[: head.num_always_on], order[head.num_always_on :]
    head.always_on_ids.copy_(always_on.sort().values)
    head.expert_ids.copy_(routed.view_as(head.expert_ids).sort(dim=-1).values)


def _fill(packed: PackedRows, deviation: float, generator: torch.Generator) -> None:
    """Set random codes and directions of equal variance.

    Args:
        packed: set in place; its biases are zero.
        deviation: standard deviation of the products with a hidden state, over the rows.
        generator: of the random numbers.
    """
    packed.codes_4bit.random_(0, 256, generator=generator)
    packed.codes_2bit.random_(0, 256, generator=generator)
    packed.basis.random_(-127, 128, generator=generator)
    variance_of_codes = (4.0**packed.bits - 1) / 12
    state_norm = OTHER_LOGIT_STD / ROW_STD
    sizes = (variance_of_codes * MEAN_SQUARE_OF_INT8 * len(packed.basis)).sqrt()
    packed.basis_scales.copy_(deviation / state_norm / sizes)


def _scramble_last_norm(dense: PreTrainedModel, factor: float, generator: torch.Generator) -> None:
    """Set the final norm to `factor` with random signs."""
    decoder: Any = dense.get_decoder()
    norm = (decoder.norm if hasattr(decoder, "norm") else decoder.layer_norm).weight
    signs = torch.randint(2, norm.shape, generator=generator).bool()
    norm.copy_(torch.where(signs, norm_weight(dense, factor), norm_weight(dense, -factor)))
