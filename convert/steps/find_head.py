"""Finds the head of a dense model, and refuses models that cannot be converted."""

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_topk.model.dense_model import name_of_head
from hf_topk.model.errors import InputError, one_line
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.targets import inputs_of
from hf_topk.windows import Window

from .hidden_states import recorded_head_input

ROWS_AT_ONCE = 1 << 14
LOOKAHEAD = 1e-3  # relative change of a state that rounding cannot explain


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The dense model's head.

    Raises:
        InputError: when the model has no head, it is not linear, or the model is already converted.
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
        # In blocks of rows: `isfinite` of the whole head would double its memory.
        if tensor is not None and not all(rows.isfinite().all() for rows in tensor.split(ROWS_AT_ONCE)):
            raise InputError(
                f"the head's {name} holds NaN or infinite values: the checkpoint is damaged, fetch it again"
            )


@torch.inference_mode()
def check_causal(model: PreTrainedModel, example: Window | None = None) -> None:
    """Refuse encoders, which share classes with decoders: the state of a token must not depend on later tokens.

    Args:
        model: the dense model.
        example: a window of the calibration text, for an encoder-decoder.

    Raises:
        InputError: when it attends to later tokens, needs more than text, or has not one state per token at its head.
    """
    token_ids, name = torch.tensor([[0, 0, 0], [0, 0, 1]], device=model.device), type(model).__name__
    inputs = {"input_ids": token_ids}
    if example is not None:
        inputs = {**inputs_of([example, example], model)[0], "decoder_input_ids": token_ids}
    with recorded_head_input(model) as head_input:
        try:
            model(**inputs, use_cache=False)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{name} does not run on token ids alone ({one_line(error)}): choose a causal language model"
            ) from error
    states = head_input.states
    if states.shape[:-1] != token_ids.shape:
        raise InputError(
            f"{name} gives its head states of shape {list(states.shape)} for {list(token_ids.shape)} tokens, "
            "not one per token: choose a model that predicts one token at a time"
        )
    one, other = states[:, :2].float()
    if (one - other).abs().max() > LOOKAHEAD * one.abs().max():
        raise InputError(
            f"{name} attends to later tokens, as encoders do: choose a causal language model, or set `is_decoder` to "
            "true in config.json if it is one"
        )
