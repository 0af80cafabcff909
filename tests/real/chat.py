"""Agreement of the sparse head on the dense model's own answers."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_topk import TopKExpertsForCausalLM
from hf_topk.progress import progress

PROMPTS = Path(__file__).with_name("prompts.jsonl")
NEW_TOKENS = 64


@dataclass(frozen=True)
class ChatAgreement:
    """Agreement of the sparse head on greedy answers of the dense model.

    Attributes:
        agreement: share of the answers' tokens that are the sparse argmax, given the tokens before them.
        tokens: tokens of all answers.
        answers: number of answers.
        identical: answers that the sparse head would give token for token.
        tokens_before_first_difference: mean over the answers; the length of an identical answer.
    """

    agreement: float
    tokens: int
    answers: int
    identical: int
    tokens_before_first_difference: float


def read_prompts() -> list[str]:
    """The bundled prompts; never used for conversion."""
    return [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def chat_agreement(model: TopKExpertsForCausalLM, prompts: list[Tensor], new_tokens: int = NEW_TOKENS) -> ChatAgreement:
    """Answer prompts greedily with the dense head, and compare the sparse argmax at each of their tokens.

    Args:
        model: a converted model; its head mode is set to "sparse".
        prompts: token ids of prompts with the chat template, [1, T] each.
        new_tokens: the most tokens of an answer.
    """
    matches = []
    with progress("Answering prompts", len(prompts), "prompts") as advance:
        for prompt in prompts:
            matches.append(_matches(model, prompt, new_tokens))
            advance()
    same = [int(match.int().cumprod(dim=0).sum()) for match in matches]
    tokens = sum(map(len, matches))
    return ChatAgreement(
        agreement=int(torch.cat(matches).sum()) / tokens,
        tokens=tokens,
        answers=len(matches),
        identical=sum(count == len(match) for count, match in zip(same, matches, strict=True)),
        tokens_before_first_difference=sum(same) / len(matches),
    )


@torch.inference_mode()
def _matches(model: TopKExpertsForCausalLM, prompt: Tensor, new_tokens: int) -> Tensor:
    """Whether each token of the dense answer is the sparse argmax: bool [length of the answer]."""
    model.head_mode = "dense"
    # No penalty, whatever the generation config says: the answer has to be a sequence of argmaxes.
    answered = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        repetition_penalty=1.0,
        lossless=False,
        max_new_tokens=new_tokens,
    )
    answer = answered[0, prompt.shape[1] :]
    model.head_mode = "sparse"
    logits = model(input_ids=answered[:, :-1], use_cache=False).logits[0, -len(answer) :]
    return logits.argmax(dim=-1) == answer
