"""Lossless decoding returns the dense model's own tokens, for any draft tokens."""

from typing import Any

import pytest
import torch
from scipy.stats import chi2
from support.lossless import NEW_TOKENS, PROMPT, SAMPLED, convert, draft_everywhere, generate, stats_of
from support.tiny_models import tiny_dense, tiny_tokenizer, with_cache
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from hf_topk import InputError, LosslessStats, TopKExpertsForCausalLM
from hf_topk.model import drafting, lossless

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": SAMPLED,
    "temperature": {**SAMPLED, "temperature": 0.6},
    "top-k": {"do_sample": True, "top_k": 5},
    "nucleus": {**SAMPLED, "top_p": 0.8},
    "min-p": {**SAMPLED, "min_p": 0.1},
    "penalties": {"do_sample": False, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "sampled penalty": {**SAMPLED, "repetition_penalty": 1.5, "temperature": 0.8},
    "several samples": {**SAMPLED, "num_return_sequences": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "sampled, static cache": {**SAMPLED, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "prompt in chunks": {"do_sample": False, "prefill_chunk_size": 2},
    "forced": {"do_sample": False, "prefix_allowed_tokens_fn": lambda _, ids: [len(ids), 80, 81, 82]},
    "embeddings": {"do_sample": False, "from_embeddings": True},
}
DRAFTED = {way: choices for way, choices in WAYS.items() if way not in ("no cache", "beams", "forced")}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
    "gemma2": {"sliding_window": 6, "head_dim": 8, "final_logit_softcapping": 30.0},
    # Its positions are scaled otherwise beyond 16: it then reads the whole prefix anew, into another cache.
    "phi3": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.fixture(autouse=True)
def drafts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft everywhere, as the routers of tiny models are always unsure."""
    draft_everywhere(monkeypatch)


# Of the quick ones, one has a plain cache, one has sliding windows, and one starts a new cache.
QUICK_MODELS = ("llama", "gemma3_text", "phi3")


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK_MODELS else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_dense(request.param, tied=False, **MODELS[request.param])


@pytest.fixture(scope="module")
def model(dense: PreTrainedModel) -> TopKExpertsForCausalLM:
    return convert(dense)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_dense(tied=False)


@pytest.fixture(scope="module")
def small(llama: PreTrainedModel) -> TopKExpertsForCausalLM:
    return convert(llama)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_dense_ones(way: str, dense: PreTrainedModel, model: TopKExpertsForCausalLM) -> None:
    stats = LosslessStats()
    for seed in range(3):
        expected = generate(dense, PROMPT - seed, seed, **WAYS[way])
        assert generate(model, PROMPT - seed, seed, **WAYS[way], lossless=True).equal(expected)
        stats += model.last_generation_stats or LosslessStats()
    if way in DRAFTED:
        assert stats.drafted > stats.accepted > 0
        assert stats.tokens == 3 * NEW_TOKENS > stats.dense_passes


@pytest.mark.parametrize("way", ["greedy", "sampling", "static cache"])
@pytest.mark.parametrize("experts", [1, 6])
def test_tokens_do_not_depend_on_the_drafts(way: str, experts: int, llama: PreTrainedModel) -> None:
    model = convert(llama, num_experts_per_tok=experts)
    assert generate(model, **WAYS[way], lossless=True).equal(generate(llama, **WAYS[way]))
    stats = stats_of(model)
    assert 0 <= stats.accepted <= stats.drafted
    if experts == 6:  # drafts are the dense model's own, with the loop's own noise
        assert stats.acceptance == 1
        assert stats.dense_passes <= 4
        assert stats.forward_passes == NEW_TOKENS


def test_other_settings_of_vllm_for_logits(llama: PreTrainedModel) -> None:
    expected = generate(llama, **SAMPLED)
    for choices in ({"num_rescored": 256}, {"router_packed": False}, {"combine": "router"}, {"combine": "learned"}):
        model = convert(llama, **choices)
        assert generate(model, **SAMPLED, lossless=True).equal(expected)
        assert stats_of(model).drafted > 0


@pytest.mark.parametrize("padding", [1, 0])
@pytest.mark.parametrize("way", ["greedy", "sampling", "static cache"])
def test_rows_end_at_different_steps(
    way: str, padding: int, dense: PreTrainedModel, model: TopKExpertsForCausalLM
) -> None:
    prompts = [[5, 17, 42, 8, 23], [3, 64], [77], [9, 11, 30]]
    padded = torch.tensor([[1] * (5 - len(prompt)) + prompt for prompt in prompts])
    choices = {**WAYS[way], "attention_mask": (padded != 1).long(), "pad_token_id": padding}
    free = generate(dense, padded, **choices)[:, 5:]
    ends = sorted({int(free[row, 3 + 5 * row]) for row in range(4)})
    expected = generate(dense, padded, **choices, eos_token_id=ends)
    lengths = {int((row == padding).cumprod(0).sum()) for row in expected[:, 5:].flip(-1)}
    assert len(lengths) > 1
    assert generate(model, padded, **choices, eos_token_id=ends, lossless=True).equal(expected)
    assert stats_of(model).tokens == expected.shape[1] - 5


def test_rows_end_by_different_criteria(llama: PreTrainedModel, small: TopKExpertsForCausalLM) -> None:
    class SecondRowEnds(StoppingCriteria):
        eos_token_id = 0  # a number, where Transformers' own have a tensor

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor([input_ids.shape[1] >= 20, input_ids.shape[1] >= 9])

    choices = {"stopping_criteria": StoppingCriteriaList([SecondRowEnds()]), "eos_token_id": 0, "do_sample": False}
    expected = generate(llama, **choices)
    assert expected.shape[1] == 20
    assert expected[1, 9:].eq(1).all()
    assert generate(small, **choices, lossless=True).equal(expected)


class Recording(BaseStreamer):
    """A streamer and logits processor that record their arguments."""

    def __init__(self) -> None:
        self.streamed: list[list[int]] = []
        self.prefixes: list[list[list[int]]] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.streamed.append(value.flatten().tolist())

    def end(self) -> None:
        self.has_ended = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.prefixes.append(input_ids.tolist())
        bias = torch.arange(scores.shape[1]).roll(len(self.prefixes)) % 7  # another one at each call
        return scores + bias


@pytest.mark.parametrize("choices", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampling"])
def test_custom_processors_see_each_prefix_once(
    choices: dict[str, Any], llama: PreTrainedModel, small: TopKExpertsForCausalLM
) -> None:
    theirs, ours = Recording(), Recording()
    expected = generate(llama, **choices, logits_processor=LogitsProcessorList([theirs]))
    sequences = generate(small, **choices, logits_processor=LogitsProcessorList([ours]), lossless=True)
    assert sequences.equal(expected)
    assert ours.prefixes == theirs.prefixes == [expected[:, :length].tolist() for length in range(5, 5 + NEW_TOKENS)]
    assert stats_of(small).drafted > 0


def test_streams_each_token_once(small: TopKExpertsForCausalLM) -> None:
    streamer = Recording()
    row = generate(small, PROMPT[:1], streamer=streamer, lossless=True)[0, 5:].tolist()
    assert streamer.streamed == [PROMPT[0].tolist(), *([token] for token in row)]
    assert streamer.has_ended


@pytest.mark.parametrize("way", ["greedy", "sampling", "static cache"])
def test_returned_outputs_are_the_dense_ones(way: str, dense: PreTrainedModel, model: TopKExpertsForCausalLM) -> None:
    names = ("scores", "logits", "hidden_states")
    asked = {"return_dict_in_generate": True, **{f"output_{name}": True for name in names}}
    theirs = generate(dense, **WAYS[way], **asked)
    ours = generate(model, **WAYS[way], **asked, lossless=True)
    assert ours.sequences.equal(theirs.sequences)
    for name in names:
        assert len(ours[name]) == NEW_TOKENS
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    assert int(ours.past_key_values.get_seq_length()) == int(theirs.past_key_values.get_seq_length())


def test_drafting_works_if_no_scored_token_is_allowed(llama: PreTrainedModel) -> None:
    model = convert(llama, num_experts_per_tok=1, num_rescored=2, num_always_on=0, num_experts=7)
    choices = {"bad_words_ids": [[token] for token in range(10, 98)]}
    for more in (SAMPLED, {**SAMPLED, "top_h": 0.5}, {"do_sample": False}):
        expected = generate(llama, **choices, **more)
        assert generate(model, **choices, **more, lossless=True).equal(expected)
        assert stats_of(model).drafted > 0


def test_second_turn_on_the_same_cache(dense: PreTrainedModel, model: TopKExpertsForCausalLM) -> None:
    turns = []
    for one, choices in ((dense, {}), (model, {"lossless": True})):
        first = generate(one, return_dict_in_generate=True, max_new_tokens=11, **choices)
        cache = first.past_key_values
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        prompt = torch.cat([first.sequences, PROMPT], dim=1)
        turns.append(generate(one, prompt, **with_cache(cache), **choices))
    assert turns[0].equal(turns[1])


def test_drafting_stops_at_the_maximum_length(llama: PreTrainedModel) -> None:
    dense = tiny_dense("gpt2", tied=False, n_positions=16)
    model = convert(dense, num_experts_per_tok=6)
    for new_tokens in range(1, 12):
        assert generate(model, max_new_tokens=new_tokens, lossless=True).shape == (2, 5 + new_tokens)
        assert stats_of(model).forward_passes == new_tokens
    end = int(generate(dense, PROMPT[:1], max_new_tokens=11)[0, -1])
    asked = {"max_new_tokens": 60, "eos_token_id": end}
    assert generate(model, PROMPT[:1], **asked, lossless=True).equal(generate(dense, PROMPT[:1], **asked))


def test_default_in_the_generation_config(tmp_path: Any, small: TopKExpertsForCausalLM, llama: Any) -> None:
    expected = generate(llama, **SAMPLED)
    small.save_pretrained(tmp_path)
    assert "lossless" not in (tmp_path / "generation_config.json").read_text()
    model = TopKExpertsForCausalLM.from_pretrained(tmp_path)
    model.generation_config.lossless = True
    model.save_pretrained(tmp_path / "again")
    model = TopKExpertsForCausalLM.from_pretrained(tmp_path / "again")
    assert model.generation_config.lossless is True
    assert generate(model, **SAMPLED).equal(expected)
    assert stats_of(model).drafted > 0
    generate(model, lossless=False)
    assert model.last_generation_stats is None
    config = GenerationConfig(max_new_tokens=5, pad_token_id=1)
    assert model.generate(PROMPT, config).shape == (2, 10)
    assert stats_of(model).tokens == 5
    config.lossless = False
    model.generate(PROMPT, generation_config=config)
    assert model.last_generation_stats is None


def test_a_user_s_generation_config(small: TopKExpertsForCausalLM) -> None:
    small.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=5, pad_token_id=1, lossless=True))
    assert stats_of(small).tokens <= 5
    small.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=5, pad_token_id=1))
    assert small.last_generation_stats is None


def test_a_custom_generation_loop_gets_dense_logits(llama: PreTrainedModel, small: TopKExpertsForCausalLM) -> None:
    def own_loop(model: Any, input_ids: Tensor, stopping_criteria: StoppingCriteriaList, **_: Any) -> Tensor:
        while not stopping_criteria(input_ids, None).all():
            logits = model(input_ids).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.topk(2).indices[:, 1:]], dim=1)  # the second best, at that
        return input_ids

    expected = generate(llama, custom_generate=own_loop)
    assert generate(small, custom_generate=own_loop, lossless=True).equal(expected)
    assert not generate(small, custom_generate=own_loop).equal(expected)


def test_pipeline(llama: PreTrainedModel) -> None:
    tokenizer, prompts = tiny_tokenizer(), ["w3 w14 w15", "w9"]
    choices: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    expected = pipeline("text-generation", model=llama, tokenizer=tokenizer)(prompts, **choices)
    model = convert(llama)
    assert pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, **choices, lossless=True) == expected
    assert stats_of(model).drafted > 0
    model.generation_config.lossless = True
    assert pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, **choices) == expected
    assert stats_of(model).drafted > 0


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next"])
def test_models_with_recurrent_states_are_not_drafted(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {} if model_type == "mamba" else {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
    dense = tiny_dense(model_type, tied=False, **choices)
    model = convert(dense)
    warnings: list[str] = []
    monkeypatch.setattr(lossless.logger, "warning_once", warnings.append)
    assert generate(model, lossless=True).equal(generate(dense))
    assert stats_of(model) == LosslessStats(NEW_TOKENS, NEW_TOKENS, NEW_TOKENS, 0, 0)
    assert len(warnings) == 1
    assert "verifies every token" in warnings[0]


@pytest.mark.parametrize(("rows", "has_room"), [(64, True), (65, False)])
def test_large_batches_are_not_drafted(
    rows: int, has_room: bool, llama: PreTrainedModel, small: TopKExpertsForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(lossless.logger, "warning_once", warnings.append)
    prompts = PROMPT[:1].expand(rows, -1)
    assert generate(small, prompts, max_new_tokens=6, lossless=True).equal(generate(llama, prompts, max_new_tokens=6))
    assert (stats_of(small).drafted > 0) == has_room
    assert len(warnings) == (not has_room)
    assert has_room or "a batch of more than 64 rows leaves no room for draft tokens" in warnings[0]


def test_leaves_the_model_unchanged(small: TopKExpertsForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    before = generate(small)
    with pytest.raises(RuntimeError, match="stop"):
        generate(small, lossless=True, logits_processor=[fail])
    assert small.head.replacement is None
    assert small.head_mode == "auto"
    assert generate(small).equal(before)
    small.head_mode = "dense"
    generate(small, lossless=True)
    assert small.last_generation_stats is None  # dense decoding is what it is
    small.head_mode = "auto"


def test_refuses_a_lossless_that_is_not_a_bool(small: TopKExpertsForCausalLM) -> None:
    with pytest.raises(InputError, match="lossless is 'yes', must be true or false"):
        small.generate(PROMPT, lossless="yes")


def accept_all(block: lossless.BlockReader, _: Tensor) -> bool:
    """Replaces the comparison: a wrong implementation that accepts every draft token."""
    return block.returned < len(block.block.outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "is_broken"), [(4, False), (6, False), (4, True)], ids=["some wrong", "all right", "wrongly accepted"]
)
def test_distribution_of_two_tokens(
    experts: int, is_broken: bool, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second and third token are of one block, so the third depends on the draft of the second."""
    model, stats = convert(llama, num_experts_per_tok=experts), LosslessStats()
    for module in (lossless, drafting):
        monkeypatch.setattr(module, "MOST_POSITIONS", 1 << 20)
    if is_broken:
        monkeypatch.setattr(lossless.BlockReader, "continues_with", accept_all)
    prompt, choices = PROMPT[:1], {**SAMPLED, "max_new_tokens": 3, "num_return_sequences": 2000, "lossless": True}
    draws = []
    for seed in range(100):  # 200 000 draws
        draws.append(generate(model, prompt, seed, **choices)[:, 6:])
        stats += stats_of(model)
    assert stats.drafted > 0
    assert (stats.accepted < stats.drafted) == (experts == 4 and not is_broken)
    counts = torch.bincount(torch.cat(draws) @ torch.tensor([100, 1]), minlength=10_000).double()
    expected = law_of_two_tokens(llama, prompt) * counts.sum()
    common = expected >= 5
    counts, expected = (torch.cat([one[common], one[~common].sum()[None]]) for one in (counts, expected))
    assert len(counts) > 20
    p_value = chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1)
    assert p_value < 1e-9 if is_broken else p_value > 1e-3


@torch.no_grad()
def law_of_two_tokens(dense: PreTrainedModel, prompt: Tensor) -> Tensor:
    """The probability of tokens v and w at the second and third place, at index 100 v + w: [10000]."""
    every = torch.arange(100)
    first = dense(prompt).logits[0, -1].softmax(-1)
    second = dense(torch.cat([prompt.expand(100, -1), every[:, None]], dim=1)).logits[:, -1].softmax(-1)
    pairs = torch.cartesian_prod(every, every)
    third = dense(torch.cat([prompt.expand(len(pairs), -1), pairs], dim=1), logits_to_keep=1).logits[:, -1].softmax(-1)
    return torch.einsum("u,uv,uvw->vw", *(one.double() for one in (first, second, third.view(100, 100, 100)))).flatten()
