"""Assisted generation of targets with other tokenizers, and the assistant afterwards."""

import copy
from typing import Any

import pytest
import torch
from support.tiny_models import WORDS, tiny_converted, tiny_dense
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_topk import TopKExpertsForCausalLM

PROMPT = torch.tensor([[5, 17, 42, 8, 23]])
CHOICES: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 1}
SAMPLED = {"do_sample": True, "top_k": 0}


class OrderedTokenizer(PreTrainedTokenizerFast):
    """A tokenizer with ordered tokens: Transformers numbers shared tokens in the order of the vocabulary."""

    def get_vocab(self) -> dict[str, int]:
        return dict(sorted(super().get_vocab().items(), key=lambda entry: entry[1]))


def tokenizer_of(words: list[str]) -> OrderedTokenizer:
    vocabulary = {"<|endoftext|>": 0, "<pad>": 1, **{word: number + 2 for number, word in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    return OrderedTokenizer(tokenizer_object=tokenizer, **special)


class Target:
    """A dense target with its own pair of tokenizers, by which Transformers caches the shared tokens."""

    def __init__(self, first: int, past: int) -> None:
        self.tokenizers = {
            "tokenizer": tokenizer_of([f"w{number}" for number in range(first, past)]),
            "assistant_tokenizer": tokenizer_of(WORDS),
        }
        self.model = tiny_dense(tied=False, num_hidden_layers=1)
        self.model.resize_token_embeddings(past - first + 10, mean_resizing=False)
        self.model.get_output_embeddings().weight.data.normal_(std=0.4, generator=torch.Generator().manual_seed(first))

    def generate(self, assistant: Any, **choices: Any) -> Tensor:
        torch.manual_seed(0)
        choices = {**CHOICES, **SAMPLED, **self.tokenizers, **choices}
        return self.model.generate(PROMPT, assistant_model=assistant, **choices)


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny_dense(tied=False)


def convert(dense: PreTrainedModel, experts: int = 6) -> TopKExpertsForCausalLM:
    """A converted model; it is the dense model if all 6 experts are picked."""
    return tiny_converted(dense, num_experts_per_tok=experts, head_mode="sparse")


def alone(model: Any, **choices: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(PROMPT, **{**CHOICES, "do_sample": False, **choices})


def test_its_drafts_are_those_of_the_dense_model(dense: PreTrainedModel) -> None:
    expected, found = (
        [target.generate(assistant), target.generate(assistant), target.generate(assistant, top_p=0.7)]
        for target, assistant in ((Target(30, 110), copy.deepcopy(dense)), (Target(30, 110), convert(dense)))
    )
    assert all(one.shape == (1, 25) for one in expected)
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


def test_it_drafts_with_few_experts(dense: PreTrainedModel) -> None:
    assert Target(30, 110).generate(convert(dense, 1)).shape == (1, 25)


def test_it_generates_on_its_own_afterwards(dense: PreTrainedModel) -> None:
    """Of dense assistants Transformers prunes the head and removes the repetition penalty."""
    for experts in (1, 6):
        model = convert(dense, experts)
        model.generation_config.repetition_penalty = 1.3
        ways: list[dict[str, Any]] = [{}, {"do_sample": True}, {"num_beams": 2}, {"lossless": True}]
        before, names = [alone(model, **way) for way in ways], model.state_dict().keys()
        assert not before[0].equal(alone(model, repetition_penalty=1.0))
        target = Target(30, 110)
        for _ in range(2):
            target.generate(model)
            assert [alone(model, **way).equal(tokens) for way, tokens in zip(ways, before, strict=True)] == [True] * 4
        assert model.get_output_embeddings() is model.head
        assert model.state_dict().keys() == names
        assert model.generation_config.repetition_penalty == 1.3


@pytest.mark.slow
def test_targets_in_turn(dense: PreTrainedModel) -> None:
    """With two other tokenizers, the same one, and greedy decoding: each target has the drafts that it has alone."""
    one, other = Target(30, 110), Target(10, 80)
    same = tiny_dense(tied=False, num_hidden_layers=1)

    def of_the_same(assistant: Any) -> Tensor:
        torch.manual_seed(0)
        return same.generate(PROMPT, assistant_model=assistant, **CHOICES, **SAMPLED)

    def greedily(assistant: Any) -> Tensor:
        return one.generate(assistant, do_sample=False, top_k=None)

    for target in (one, other):
        target.generate(copy.deepcopy(dense))  # what Transformers finds out about the tokenizers takes random numbers
    one, other = Target(30, 110), Target(10, 80)
    model = convert(dense)
    one.generate(model), other.generate(model)
    turns = [one.generate, of_the_same, other.generate, greedily, one.generate, alone, other.generate, of_the_same]
    expected: dict[Any, Tensor] = {}
    for turn in turns:
        found = turn(model)
        if turn in (of_the_same, greedily, alone):
            assert found.equal(turn(convert(dense)))
        assert expected.setdefault(turn, found).equal(found)
    assert not expected[one.generate].equal(expected[other.generate])


def test_as_target_of_assisted_generation(dense: PreTrainedModel) -> None:
    """With a dense and a converted assistant, sparse and lossless."""
    other = tokenizer_of([f"w{number}" for number in range(30, 110)])
    assistant = Target(30, 110).model
    tokenizers = {"tokenizer": tokenizer_of(WORDS), "assistant_tokenizer": other}
    choices: dict[str, Any] = {**tokenizers, "assistant_model": assistant}
    model = convert(dense, 1)
    assert alone(model, **choices).equal(alone(model))
    assert alone(model, **choices, lossless=True).equal(alone(dense))
    drafting = tiny_converted(assistant, num_experts=6, num_always_on=8, num_experts_per_tok=2)
    choices["assistant_model"] = drafting
    assert alone(model, **choices).equal(alone(model))
    assert alone(model, **choices, **SAMPLED).shape == (1, 25)
