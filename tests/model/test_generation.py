"""The decoding strategies of `generate`: with all experts the dense model's tokens, with few experts finite scores."""

import threading
from typing import Any

import pytest
import torch
from support.tiny_models import VOCAB_SIZE, tiny_converted, tiny_dense, tiny_tokenizer
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from hf_topk import TopKExpertsForCausalLM

PROMPT = torch.tensor([[5, 17, 42, 8, 23], [99, 3, 64, 2, 77]])
NO_END = {"eos_token_id": None, "max_new_tokens": 8}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "nucleus sampling": {"do_sample": True, "top_p": 0.8, "temperature": 0.7},
    "min-p sampling": {"do_sample": True, "min_p": 0.1, "top_k": 0},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "dynamic cache": {"do_sample": False, "cache_implementation": "dynamic"},
    "no cache": {"do_sample": False, "use_cache": False},
    "penalty": {"do_sample": False, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "bad words": {"do_sample": False, "bad_words_ids": [[number] for number in range(2, 60)]},
    "forced": {"do_sample": False, "prefix_allowed_tokens_fn": lambda _, ids: [len(ids), 80 + len(ids)]},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "embeddings": {"do_sample": False, "from_embeddings": True},
    "beams from embeddings": {"do_sample": False, "num_beams": 3, "from_embeddings": True},
}


class RecordingStreamer(BaseStreamer):
    """Records the tokens that `generate` streams."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.has_ended = True


def convert(dense: PreTrainedModel, **choices: Any) -> TopKExpertsForCausalLM:
    torch.manual_seed(1)  # the same router and tail each time
    return tiny_converted(dense, **{"head_mode": "sparse", **choices})


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Untied, as tied tiny models repeat the last token."""
    return tiny_dense(request.param, tied=False)


@pytest.fixture(scope="module")
def whole(dense: PreTrainedModel) -> TopKExpertsForCausalLM:
    """A converted model with all experts picked."""
    return convert(dense, num_experts_per_tok=6)


@pytest.fixture(scope="module")
def small(dense: PreTrainedModel) -> TopKExpertsForCausalLM:
    """A converted model with one expert of six picked."""
    return convert(dense, num_experts_per_tok=1)


@pytest.fixture(scope="module", params=["whole", "small"])
def either(
    request: pytest.FixtureRequest, whole: TopKExpertsForCausalLM, small: TopKExpertsForCausalLM
) -> TopKExpertsForCausalLM:
    return {"whole": whole, "small": small}[request.param]


def generate(model: Any, prompt: Tensor = PROMPT, *, from_embeddings: bool = False, **choices: Any) -> Any:
    if from_embeddings:  # of other tokens than those of the prompt
        choices["inputs_embeds"] = model.get_input_embeddings()(prompt.flip(1)).detach()
    torch.manual_seed(0)
    return model.generate(prompt, **{"pad_token_id": 1, **NO_END, **choices})


@pytest.mark.parametrize("way", WAYS)
def test_all_experts_generate_the_dense_tokens(way: str, dense: PreTrainedModel, whole: TopKExpertsForCausalLM) -> None:
    prompt = PROMPT[:1] if way == "lookup" else PROMPT
    expected = generate(dense, prompt, **WAYS[way])
    assert expected.shape[1] == 13
    assert generate(whole, prompt, **WAYS[way]).equal(expected)


@pytest.mark.parametrize("way", WAYS)
def test_few_experts_generate(way: str, small: TopKExpertsForCausalLM) -> None:
    prompt = PROMPT[:1] if way == "lookup" else PROMPT
    out = generate(small, prompt, **WAYS[way], return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert out.sequences.shape == (len(prompt) * WAYS[way].get("num_return_sequences", 1), 13)
    assert out.sequences.max() < VOCAB_SIZE
    assert all(logits.isfinite().all() for logits in out.logits)
    assert not any(scores.isnan().any() or (scores == torch.inf).any() for scores in out.scores)
    if way == "forced":  # always possible, though most tokens were not scored
        for row in out.sequences:
            assert all(int(token) in (place, 80 + place) for place, token in enumerate(row[5:], start=5))
    if way == "bad words":
        assert not any(2 <= token < 60 for token in out.sequences[:, 5:].flatten().tolist())


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams", "static cache"])
def test_scores_of_all_experts_are_the_dense_scores(
    way: str, dense: PreTrainedModel, whole: TopKExpertsForCausalLM
) -> None:
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = (generate(model, **WAYS[way], **asked) for model in (dense, whole))
    assert len(ours.scores) == len(theirs.scores) == 8
    for name in ("scores", "logits"):
        for one, other in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("way", ["greedy", "sampling", "static cache"])
def test_few_experts_score_every_token_finite(way: str, small: TopKExpertsForCausalLM) -> None:
    out = generate(small, **WAYS[way], return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 8
    assert all(scores.isfinite().all() and scores.shape == (2, VOCAB_SIZE) for scores in out.scores)


@pytest.mark.parametrize("way", ["greedy", "beams", "static cache"])
def test_left_padding_changes_nothing(way: str, either: TopKExpertsForCausalLM) -> None:
    """Each row of a padded batch has the tokens that it has alone."""
    choices = {**WAYS[way], "num_return_sequences": 1}
    prompts = [[5, 17, 42, 8, 23], [3, 64], [77]]
    alone = [generate(either, torch.tensor([prompt]), **choices)[0, len(prompt) :].tolist() for prompt in prompts]
    padded = torch.tensor([[1] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    assert generate(either, padded, attention_mask=mask, **choices)[:, 5:].tolist() == alone


def test_a_prompt_can_be_given_as_embeddings(dense: PreTrainedModel, whole: TopKExpertsForCausalLM) -> None:
    theirs, ours = (
        model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT), pad_token_id=1, do_sample=False, **NO_END)
        for model in (dense, whole)
    )
    assert ours.equal(theirs)
    assert ours.equal(generate(dense, do_sample=False)[:, PROMPT.shape[1] :])


def test_sampling_follows_its_seed(small: TopKExpertsForCausalLM) -> None:
    choices = {"do_sample": True, "max_new_tokens": 20}
    first, again = generate(small, **choices), generate(small, **choices)
    assert first.equal(again)
    other = small.generate(PROMPT, **{"pad_token_id": 1, **NO_END, **choices})  # the seed goes on
    assert not other.equal(first)


@pytest.mark.parametrize("way", ["greedy", "sampling"])
def test_streams_token_by_token(way: str, small: TopKExpertsForCausalLM) -> None:
    streamer = RecordingStreamer()
    out = generate(small, PROMPT[:1], **WAYS[way], streamer=streamer)
    assert streamer.seen == [PROMPT[0].tolist()] + [[token] for token in out[0, 5:].tolist()]
    assert streamer.has_ended


def test_streams_text_to_another_thread(small: TopKExpertsForCausalLM) -> None:
    tokenizer = tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    choices: dict[str, Any] = {"do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=generate, args=(small, PROMPT[:1]), kwargs=choices)
    thread.start()
    text = "".join(streamer)
    thread.join(60)
    assert text.split() == tokenizer.decode(generate(small, PROMPT[:1], do_sample=False)[0, 5:]).split()


def test_end_of_text_stops(either: TopKExpertsForCausalLM) -> None:
    free = generate(either, PROMPT[:1], do_sample=False)[0, 5:].tolist()
    end = next(token for token in free[1:] if token != free[0])
    stopped = generate(either, PROMPT[:1], do_sample=False, eos_token_id=end)[0, 5:].tolist()
    assert stopped == free[: free.index(end) + 1]
    assert len(stopped) < len(free)


def test_logits_processor_sees_every_token(small: TopKExpertsForCausalLM) -> None:
    seen: list[Tensor] = []

    def least_likely(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores)
        return -scores

    out = generate(small, do_sample=False, logits_processor=LogitsProcessorList([least_likely]))
    assert all(scores.isfinite().all() for scores in seen)
    assert out[:, 5:].equal(torch.stack([scores.argmin(-1) for scores in seen], dim=1))


def test_auto_is_sparse_for_one_row_and_dense_for_two(dense: PreTrainedModel, small: TopKExpertsForCausalLM) -> None:
    """In prefill `generate` computes logits of the last position only."""
    model = convert(dense, num_experts_per_tok=1, head_mode="auto", sparse_max_positions=1)
    assert generate(model, PROMPT[:1], do_sample=False).equal(generate(small, PROMPT[:1], do_sample=False))
    assert generate(model, do_sample=False).equal(generate(dense, do_sample=False))  # two rows are dense


def test_pipeline(dense: PreTrainedModel, either: TopKExpertsForCausalLM) -> None:
    tokenizer = tiny_tokenizer()
    choices: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    prompt = "w3 w14 w15"
    answers = {
        model: pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, **choices)
        for model in (dense, either)
    }
    text = answers[either][0]["generated_text"]
    assert text.startswith(prompt)
    assert len(text.split()) > 3
    if either.config.num_experts_per_tok == 6:
        assert text == answers[dense][0]["generated_text"]


def test_pipeline_in_batches(either: TopKExpertsForCausalLM) -> None:
    pipe = pipeline("text-generation", model=either, tokenizer=tiny_tokenizer())
    prompts = ["w3 w14 w15", "w9", "w26 w5"]
    one, three = (pipe(prompts, do_sample=False, max_new_tokens=6, batch_size=size) for size in (1, 3))
    assert one == three


def test_likelihood_of_a_text_is_finite(small: TopKExpertsForCausalLM) -> None:
    with torch.no_grad():
        loss = small(input_ids=PROMPT, labels=PROMPT).loss
    assert loss.isfinite()
