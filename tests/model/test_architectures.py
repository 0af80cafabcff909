"""Converted models of many architectures: equal to the dense model with all experts, in memory and on disk."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import tiny_converted, tiny_dense
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_topk import TopKExpertsForCausalLM
from hf_topk.model import drafting, lossless
from hf_topk.model.errors import TopKExpertsError
from studies.architectures import check_conversion
from studies.tiny_models import tiny_model

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"tied": False}),
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", {"tied": False}),
    "gpt_neox": ("gpt_neox", {"tied": False}),
    "gemma2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 4}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 4}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "phi": ("phi", {"tied": False, "bias": True}),
    "opt": ("opt", {"word_embed_proj_dim": 16, "ffn_dim": 48}),
    "mamba": ("mamba", {"state_size": 4}),
    "mixtral": ("mixtral", {"tied": False, "num_local_experts": 4}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
}
PROMPT = torch.tensor([[5, 17, 42, 8, 23], [99, 3, 64, 2, 77]])
ADDITIONS = ("always_on_ids", "expert_ids", "router.", "tail.")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    model_type, choices = ARCHITECTURES[request.param]
    return tiny_dense(model_type, **choices)


@pytest.fixture(scope="module")
def converted(dense: PreTrainedModel) -> TopKExpertsForCausalLM:
    """The converted model with all experts picked."""
    return tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")


@pytest.fixture(scope="module")
def folders(
    dense: PreTrainedModel, converted: TopKExpertsForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The folders of the saved dense and converted model."""
    folder = tmp_path_factory.mktemp("saved")
    dense.save_pretrained(folder / "dense")
    converted.save_pretrained(folder / "converted")
    return folder / "dense", folder / "converted"


@torch.no_grad()
def logits_of(model: Any, **inputs: Any) -> Tensor:
    return model(**{"input_ids": PROMPT, **inputs}).logits


def continuations(model: Any, **choices: Any) -> list[list[int]]:
    return model.generate(PROMPT, max_new_tokens=8, do_sample=False, eos_token_id=None, **choices).tolist()


def test_all_experts_give_the_dense_logits(dense: PreTrainedModel, converted: TopKExpertsForCausalLM) -> None:
    expected = logits_of(dense)
    assert expected.std() > 0.1  # enough for a wrong row to be seen
    torch.testing.assert_close(logits_of(converted), expected, rtol=1e-5, atol=1e-4)
    one = PROMPT[:1, :1]
    torch.testing.assert_close(
        logits_of(converted, input_ids=one), logits_of(dense, input_ids=one), rtol=1e-5, atol=1e-4
    )


def test_dense_mode_is_the_dense_model_bit_for_bit(dense: PreTrainedModel) -> None:
    converted = tiny_converted(dense, head_mode="dense")
    assert logits_of(converted).equal(logits_of(dense))
    converted.head_mode = "sparse"
    assert not torch.allclose(logits_of(converted), logits_of(dense), atol=1e-2)


def test_loss_and_hidden_states_are_the_dense_model_s(
    dense: PreTrainedModel, converted: TopKExpertsForCausalLM
) -> None:
    """With gradients, head mode `auto` runs dense."""
    converted = copy.deepcopy(converted)
    converted.head_mode = "auto"
    ours, theirs = (model(input_ids=PROMPT, labels=PROMPT, output_hidden_states=True) for model in (converted, dense))
    assert ours.loss.equal(theirs.loss)
    assert ours.loss.requires_grad
    assert all(one.equal(other) for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True))


def test_generates_the_dense_model_s_tokens(dense: PreTrainedModel, converted: TopKExpertsForCausalLM) -> None:
    expected = continuations(dense)
    assert continuations(converted) == expected
    converted.head_mode = "dense"
    assert continuations(converted) == expected
    converted.head_mode = "sparse"


def test_reloads_whole(folders: tuple[Path, Path], converted: TopKExpertsForCausalLM) -> None:
    reloaded, info = AutoModelForCausalLM.from_pretrained(folders[1], output_loading_info=True)
    assert isinstance(reloaded, TopKExpertsForCausalLM)
    assert not any(info.values())
    state = converted.state_dict()
    assert reloaded.state_dict().keys() == state.keys()
    assert all(tensor.equal(state[name]) for name, tensor in reloaded.state_dict().items())
    assert logits_of(reloaded).equal(logits_of(converted))
    is_tied = converted.get_input_embeddings().weight is converted.head.weight
    assert (reloaded.get_input_embeddings().weight is reloaded.head.weight) == is_tied


def test_saved_twice_is_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folders[1]).save_pretrained(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (folders[1], tmp_path))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_dense_tensors_keep_names_and_values(folders: tuple[Path, Path]) -> None:
    theirs, ours = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].equal(tensor)
    added = ours.keys() - theirs.keys()
    assert added
    assert all(name.partition(".")[2].startswith(ADDITIONS) for name in added), added


def test_folder_loads_as_the_dense_model(folders: tuple[Path, Path], dense: PreTrainedModel) -> None:
    config = AutoConfig.from_pretrained(folders[1]).text_config
    loaded, info = AutoModelForCausalLM.from_pretrained(folders[1], config=config, output_loading_info=True)
    assert type(loaded) is type(dense)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert logits_of(loaded).equal(logits_of(dense))


def test_class_attributes_are_the_dense_class_s(dense: PreTrainedModel, converted: TopKExpertsForCausalLM) -> None:
    """Such as the supported attention implementations and caches."""
    for name in ("_supports_sdpa", "_supports_flash_attn", "_can_compile_fullgraph", "_is_stateful", "main_input_name"):
        assert getattr(converted, name) == getattr(dense, name)
    assert converted.base.config._attn_implementation == dense.config._attn_implementation


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "is_drafted"), [("llama", True), ("mamba", False)])
def test_the_check_of_each_type_fails_without_drafting(
    model_type: str, is_drafted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tiny_model(AutoModelForCausalLM, model_type)
    check_conversion(dense, tmp_path / "right")
    assert drafting.DOUBT_A_PASS == 2.0  # as it was before
    monkeypatch.setattr(lossless, "FIRST_SIZE", 1)
    monkeypatch.setattr(lossless, "LARGEST_SIZE", 1)
    with pytest.raises(TopKExpertsError, match="is not drafted") if is_drafted else nullcontext():
        check_conversion(dense, tmp_path / "none")
