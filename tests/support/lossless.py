"""Helpers for the tests of lossless decoding."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_topk import LosslessStats, TopKExpertsForCausalLM
from hf_topk.model import drafting
from support.tiny_models import tiny_converted

PROMPT = torch.tensor([[5, 17, 42, 8, 23], [99, 3, 64, 2, 77]])
NEW_TOKENS = 24
SAMPLED = {"do_sample": True, "top_k": 0}


def convert(dense: PreTrainedModel, **choices: Any) -> TopKExpertsForCausalLM:
    """A converted model with some of its draft tokens accepted: half of the tokens are screened, by a random router."""
    torch.manual_seed(1)
    chosen = {"num_experts_per_tok": 4, "num_rescored": 56, "router_packed": True, **choices}
    return tiny_converted(dense, **chosen)


def generate(
    model: Any, prompt: Tensor = PROMPT, seed: int = 0, *, from_embeddings: bool = False, **choices: Any
) -> Any:
    if from_embeddings:  # embeddings of other tokens than the prompt's
        choices["inputs_embeds"] = model.get_input_embeddings()(prompt.flip(1)).detach()
    torch.manual_seed(seed)
    return model.generate(prompt, **{"pad_token_id": 1, "eos_token_id": None, "max_new_tokens": NEW_TOKENS, **choices})


def stats_of(model: TopKExpertsForCausalLM) -> LosslessStats:
    assert model.last_generation_stats is not None
    return model.last_generation_stats


def draft_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft however unsure the router is, as the routers of tiny models always are."""
    monkeypatch.setattr(drafting, "DOUBT_A_PASS", math.inf)
