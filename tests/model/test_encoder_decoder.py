"""Converted encoder-decoders: their output is the dense model's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.lossless import draft_everywhere
from support.seq2seq_models import SPEECH, TEXT, tiny_model
from support.tiny_models import tiny_converted, tiny_dense
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from hf_topk import InputError, TopKExpertsForSeq2SeqLM, TopKExpertsForSpeechSeq2Seq

NEW_TOKENS = 24
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "penalties": {"do_sample": False, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "suppressed": {"do_sample": False, "suppress_tokens": list(range(20, 60))},
    "forced": {"do_sample": False, "forced_bos_token_id": 7},
    "several samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.fixture(autouse=True)
def drafts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft everywhere, as the routers of tiny models are always unsure."""
    draft_everywhere(monkeypatch)


@pytest.fixture(scope="module", params=[*TEXT, *SPEECH])
def dense_and_inputs(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, dict[str, Any]]:
    return tiny_model(request.param)


def written(model: Any, inputs: dict[str, Any], seed: int = 0, **choices: Any) -> list[list[int]]:
    torch.manual_seed(seed)
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, eos_token_id=None, **choices).tolist()


def logits_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, decoder_input_ids=torch.tensor([[1, 5, 17, 8], [1, 42, 3, 99]])).logits


def test_saved_and_loaded_it_is_the_dense_model_with_all_experts(
    dense_and_inputs: tuple[PreTrainedModel, dict[str, Any]], tmp_path: Path
) -> None:
    dense, inputs = dense_and_inputs
    model = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    expected_class = TopKExpertsForSpeechSeq2Seq if dense.config.model_type in SPEECH else TopKExpertsForSeq2SeqLM
    assert type(model) is expected_class
    model.save_pretrained(tmp_path)
    auto_class = getattr(transformers, model.auto_class)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is expected_class
    assert not any(info.values())
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(dense, inputs), rtol=1e-4, atol=1e-4)
    assert written(loaded, inputs) == written(dense, inputs)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.is_encoder_decoder
    as_dense = auto_class.from_pretrained(tmp_path, config=config.text_config)
    assert type(as_dense) is type(dense)
    assert logits_of(as_dense, inputs).equal(logits_of(dense, inputs))


@pytest.mark.parametrize("way", WAYS)
def test_output_is_the_dense_model_s(dense_and_inputs: tuple[PreTrainedModel, dict[str, Any]], way: str) -> None:
    """With all experts, and lossless with half of them; the encoder runs once."""
    dense, inputs = dense_and_inputs
    if way == "static cache" and not dense._can_compile_fullgraph:
        pytest.skip(f"{type(dense).__name__} has no static cache")
    text = written(dense, inputs, **WAYS[way])
    model = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    assert written(model, inputs, **WAYS[way]) == text
    model.num_experts_per_tok = 5
    calls: list[None] = []
    model.get_encoder().register_forward_hook(lambda *_: calls.append(None))
    assert written(model, inputs, lossless=True, **WAYS[way]) == text
    assert len(calls) == 1
    stats = model.last_generation_stats
    if way == "beams":
        assert stats is None
    else:
        assert stats is not None
        assert stats.tokens == NEW_TOKENS
        assert stats.drafted > 0
    if way in ("greedy", "sampling"):
        assert stats.accepted > 0


def test_the_likeliest_token_is_the_same_without_logits_of_all(
    dense_and_inputs: tuple[PreTrainedModel, dict[str, Any]],
) -> None:
    dense, inputs = dense_and_inputs
    model = tiny_converted(dense, num_experts_per_tok=2, num_rescored=16, head_mode="sparse")
    whole = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, eos_token_id=None, return_dict_in_generate=True, output_logits=True
    )
    assert [row[-NEW_TOKENS:] for row in written(model, inputs)] == whole["sequences"][:, -NEW_TOKENS:].tolist()


def test_a_bias_added_after_the_head_is_part_of_token_comparisons() -> None:
    dense, inputs = tiny_model("marian")
    model = tiny_converted(dense, num_experts_per_tok=2, head_mode="sparse", num_rescored=16)
    sparse, expected = logits_of(model, inputs), logits_of(dense, inputs)
    always_on = model.head.always_on_ids
    torch.testing.assert_close(sparse[..., always_on], expected[..., always_on], rtol=1e-5, atol=1e-5)
    assert model.head.full_bias.equal(dense.final_logits_bias[0])
    model.base.final_logits_bias = torch.zeros(1, 100)  # whatever is loaded into it later counts
    logits_of(model, inputs)
    assert not model.head.full_bias.any()
    assert copy.deepcopy(model).head.later_bias is not model.head.later_bias


def test_a_resized_model_has_a_bias_for_each_token() -> None:
    dense, inputs = tiny_model("marian")
    model = tiny_converted(dense, head_mode="sparse")
    model.resize_token_embeddings(110)
    assert logits_of(model, inputs).shape[-1] == 110
    assert model.base.final_logits_bias.shape == (1, 110)


def test_another_auto_class_is_refused_with_the_right_one(tmp_path: Path) -> None:
    tiny_converted(tiny_model("t5")[0]).save_pretrained(tmp_path / "t5")
    tiny_converted(tiny_model("whisper")[0]).save_pretrained(tmp_path / "whisper")
    tiny_converted(tiny_dense()).save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="load the converted model with AutoModelForSeq2SeqLM"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="load the converted model with AutoModelForSpeechSeq2Seq"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whisper")
    with pytest.raises(InputError, match="load the converted model with AutoModelForCausalLM"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "llama")
