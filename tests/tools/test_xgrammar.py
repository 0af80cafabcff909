"""JSON by a schema with xgrammar, which masks logits; allowed tokens need not be scored."""

import json
from typing import Any

import pytest
import torch
import xgrammar
from support.lossless import draft_everywhere
from support.tiny_models import character_tokenizer, tiny_converted, tiny_dense
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from xgrammar.contrib.hf import LogitsProcessor

from hf_topk import TopKExpertsForCausalLM

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Kwairyo", "Hoichi", "Oshidori"]},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
        "is_priest": {"type": "boolean"},
    },
    "required": ["name", "age", "is_priest"],
    "additionalProperties": False,
}
WAYS: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True, "top_k": 0}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny_dense(tied=False)


@pytest.fixture(scope="module")
def model(dense: PreTrainedModel) -> TopKExpertsForCausalLM:
    """A converted model with one expert of six picked."""
    return tiny_converted(dense, num_experts_per_tok=1, head_mode="sparse")


class Recording(LogitsProcessor):
    """Records the masked scores."""

    def __init__(self, grammar: Any) -> None:
        super().__init__(grammar)
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.clone())
        return super().__call__(input_ids, scores)


def answer(model: Any, tokenizer: PreTrainedTokenizerFast, seed: int, **choices: Any) -> tuple[Tensor, Recording]:
    vocab_size = model.config.get_text_config().vocab_size
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    grammar = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    processor = Recording(grammar)
    prompts = tokenizer(["Who sits there?", "Name: "], return_tensors="pt", padding=True)
    torch.manual_seed(seed)
    tokens = model.generate(**prompts, max_new_tokens=80, logits_processor=[processor], **choices)
    return tokens[:, prompts["input_ids"].shape[1] :], processor


def check_valid(tokens: Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    for text in tokenizer.batch_decode(tokens, skip_special_tokens=True):
        found = json.loads(text)
        assert list(found) == SCHEMA["required"]
        assert found["name"] in SCHEMA["properties"]["name"]["enum"]
        assert 10 <= found["age"] <= 99
        assert type(found["is_priest"]) is bool


@pytest.mark.parametrize("way", WAYS)
def test_sparse_json_is_valid(way: str, model: TopKExpertsForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(3):
        tokens, processor = answer(model, tokenizer, seed, **WAYS[way])
        check_valid(tokens, tokenizer)
        assert all(scores.isfinite().all() for scores in processor.scores)


@pytest.mark.parametrize("way", WAYS)
def test_lossless_json_is_the_dense_one(
    way: str,
    dense: PreTrainedModel,
    model: TopKExpertsForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft_everywhere(monkeypatch)
    for seed in range(3):
        expected, _ = answer(dense, tokenizer, seed, **WAYS[way])
        check_valid(expected, tokenizer)
        tokens, _ = answer(model, tokenizer, seed, **WAYS[way], lossless=True)
        assert tokens.equal(expected)
        assert model.last_generation_stats is not None
        assert model.last_generation_stats.drafted > 0
