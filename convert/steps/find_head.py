"""The head of a dense model, and what is refused about it."""

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_topk.model.dense_model import name_of_head
from hf_topk.model.errors import InputError, one_line
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM

from .hidden_states import tapped_head

ROWS_AT_ONCE = 1 << 14
LOOKAHEAD = 1e-3  # change of a state, as a share of its size, that is more than rounding


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The dense model's head.

    Raises:
        InputError: when it has none, it is not linear, or the model is already converted.
    """
    if isinstance(model, TopKExpertsForCausalLM):
        raise InputError("this model is already converted: give the dense model it was made from")
    return cast(nn.Linear, model.get_submodule(name_of_head(model)))


def check_finite(head: nn.Linear) -> None:
    """Refuse a damaged head.

    Args:
        head: the dense head.

    Raises:
        InputError: when it holds NaN or infinite values.
    """
    for name, tensor in (("weight", head.weight), ("bias", head.bias)):
        # Row by row of many: a look at all at once takes twice the head's memory.
        if tensor is not None and not all(rows.isfinite().all() for rows in tensor.split(ROWS_AT_ONCE)):
            raise InputError(
                f"the head's {name} holds NaN or infinite values: the checkpoint is damaged, fetch it again"
            )


@torch.inference_mode()
def check_causal(model: PreTrainedModel) -> None:
    """Refuse encoders, which share classes with decoders: the state at a token must not depend on the next one.

    Args:
        model: the dense model.

    Raises:
        InputError: when it looks ahead, reads more than text, or does not give the head one state a token.
    """
    token_ids, name = torch.tensor([[0, 0, 0], [0, 0, 1]], device=model.device), type(model).__name__
    with tapped_head(model) as tap:
        try:
            model(input_ids=token_ids, use_cache=False)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            was_reached = tap.states.numel() > 0
            does = (
                "changes its logits in a way that conversion cannot follow" if was_reached else "reads more than text"
            )
            raise InputError(f"{name} {does} ({one_line(error)}): choose a causal language model") from error
        if tap.states.shape[:-1] != token_ids.shape:
            raise InputError(
                f"{name} gives its head states of shape {list(tap.states.shape)} for {list(token_ids.shape)} tokens, "
                "not one for each: choose a model that predicts one token at a time"
            )
        one, other = tap.states[:, :2].float()
    if (one - other).abs().max() > LOOKAHEAD * one.abs().max():
        raise InputError(
            f"{name} looks ahead, as encoders do, so it has no head that writes text: choose a causal "
            "language model, or set `is_decoder` to true in config.json if it is meant as one"
        )
