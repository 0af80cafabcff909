"""The configuration of a converted model: its entries, refused values, and its file."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_converted, tiny_dense
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from hf_topk import InputError, TopKExpertsConfig, TopKExpertsForCausalLM

CHOICES = {
    "num_experts": st.integers(8, 1000),
    "expert_size": st.integers(1, 1000),
    "num_experts_per_tok": st.integers(1, 8),
    "num_always_on": st.integers(0, 1000),
    "router_rank": st.integers(1, 1000),
    "router_packed": st.booleans(),
    "tail_rank": st.integers(1, 1000),
    "num_rescored": st.integers(1, 1000),
    "combine": st.sampled_from(["exact", "router", "learned"]),
    "head_mode": st.sampled_from(["auto", "sparse", "dense"]),
    "sparse_max_positions": st.integers(0, 1000),
}


@settings(max_examples=30, deadline=None)
@given(
    choices=st.fixed_dictionaries({}, optional=CHOICES),
    dense=st.sampled_from([GPT2Config(n_embd=8), LlamaConfig(hidden_size=64), None]),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, choices: dict, dense: LlamaConfig | None) -> None:
    folder = tmp_path_factory.mktemp("config")
    config = TopKExpertsConfig(text_config=dense, **choices)
    config.save_pretrained(folder)
    for loaded in (AutoConfig.from_pretrained(folder), TopKExpertsConfig.from_pretrained(folder)):
        assert isinstance(loaded, TopKExpertsConfig)
        assert {name: getattr(loaded, name) for name in CHOICES} == {name: getattr(config, name) for name in CHOICES}
        assert {name: getattr(loaded, name) for name in choices} == choices
        assert type(loaded.text_config) is type(dense or LlamaConfig())
        assert loaded.text_config.hidden_size == config.text_config.hidden_size
        # What generation, caches and beam search ask for.
        assert loaded.get_text_config() is loaded.text_config
    assert json.loads((folder / "config.json").read_text())["model_type"] == "topk_experts"


def test_dense_configuration_as_a_dictionary() -> None:
    config = TopKExpertsConfig(text_config={"model_type": "gpt2", "n_embd": 8})
    assert isinstance(config.text_config, GPT2Config)
    assert config.dense_config is config.text_config
    assert config.dense_config.n_embd == 8


@pytest.mark.parametrize(
    ("choices", "cause"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"expert_size": 0}, "expert_size"),
        ({"router_rank": 0}, "router_rank"),
        ({"tail_rank": -1}, "tail_rank"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_experts": 3, "num_experts_per_tok": 4}, "num_experts_per_tok"),
        ({"num_always_on": -1}, "num_always_on"),
        ({"sparse_max_positions": -1}, "sparse_max_positions"),
        ({"num_rescored": 0}, "num_rescored"),
        ({"router_packed": "yes"}, "router_packed"),
        ({"combine": "both"}, "combine"),
        ({"head_mode": "fast"}, "head_mode"),
        ({"num_experts": "8"}, "num_experts"),
        ({"expert_size": 1.5}, "expert_size"),
    ],
)
def test_refuses_values_out_of_range(choices: dict, cause: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=cause):
        TopKExpertsConfig(**choices)


@pytest.mark.parametrize(
    "choices",
    [
        {"num_experts": 3, "num_experts_per_tok": 3},
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"sparse_max_positions": 0},
        {"num_rescored": 1, "router_rank": 1, "tail_rank": 1},
    ],
)
def test_takes_the_ends_of_ranges(choices: dict) -> None:
    config = TopKExpertsConfig(**choices)
    assert {name: getattr(config, name) for name in choices} == choices


def test_no_field_is_a_sampling_parameter() -> None:
    """Transformers would move such an entry to the generation config."""
    own = {field.name for field in fields(TopKExpertsConfig)} - {field.name for field in fields(LlamaConfig)}
    assert own >= CHOICES.keys()
    assert not own & GenerationConfig().to_dict().keys()


def test_the_generation_config_is_the_dense_model_s(tmp_path: Path) -> None:
    dense = tiny_dense()
    dense.generation_config.update(max_new_tokens=7, temperature=0.5, do_sample=True)
    converted = tiny_converted(dense)
    converted.save_pretrained(tmp_path / "converted")
    AutoModelForCausalLM.from_pretrained(tmp_path / "converted").save_pretrained(tmp_path / "again")
    dense.save_pretrained(tmp_path / "dense")
    saved = [
        json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("dense", "converted", "again")
    ]
    assert saved[0] == saved[1] == saved[2]
    assert saved[0]["max_new_tokens"] == 7
    assert "generation" not in (tmp_path / "converted" / "config.json").read_text()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("loader", [TopKExpertsConfig, TopKExpertsForCausalLM])
def test_dense_folder_is_refused(loader: type, model_type: str, tmp_path: Path) -> None:
    tiny_dense(model_type).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{model_type}.*hf-topk convert") as caught:
        loader.from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert str(tmp_path) in str(caught.value)
    assert "AutoModelForCausalLM" in str(caught.value)


def test_dense_configuration_is_refused() -> None:
    with pytest.raises(InputError, match=r"LlamaConfig.*hf-topk convert"):
        TopKExpertsForCausalLM(LlamaConfig())  # type: ignore[arg-type]


# Settings of the dense model

IDS = torch.tensor([[5, 17, 42, 8, 23]])
SETTINGS: dict[str, dict] = {
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True, "attn_implementation": "eager"},
    "no cache": {"use_cache": False},
    "first layer alone": {"num_hidden_layers": 1},
    "by its own name": {"layer_norm_epsilon": 0.5, "rms_norm_eps": 0.5},
    "the head's own": {"num_experts_per_tok": 6, "use_cache": False},
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a dense model and of its converted model, with all experts picked."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = tiny_dense(request.param)
    dense.save_pretrained(folder / "dense")
    tiny_converted(dense, num_experts_per_tok=5, head_mode="sparse").save_pretrained(folder / "converted")
    return {name: folder / name for name in ("dense", "converted")}


def outputs(model: PreTrainedModel) -> dict:
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_dense_model_reach_it_as_it_loads(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    settings = SETTINGS[name]
    dense_config = AutoConfig.from_pretrained(saved["dense"])
    of_dense = {key: value for key, value in settings.items() if hasattr(dense_config, key) or key.startswith("attn")}
    dense = AutoModelForCausalLM.from_pretrained(saved["dense"], **of_dense)
    of_head = {key: value for key, value in settings.items() if key == "num_experts_per_tok"}
    converted = AutoModelForCausalLM.from_pretrained(saved["converted"], **of_dense, **of_head, head_mode="dense")
    assert isinstance(converted, TopKExpertsForCausalLM)
    expected, got = outputs(dense), outputs(converted)
    assert got.keys() == expected.keys()
    assert got["logits"].equal(expected["logits"])
    for key in settings.keys() & {"num_hidden_layers", "use_cache"}:
        assert getattr(converted.config, key) == getattr(converted.base.config, key) == settings[key]
    converted.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=settings.get("attn_implementation"))
    assert outputs(again).keys() == expected.keys()
    assert outputs(again)["logits"].equal(expected["logits"])
    assert again.head.num_experts_per_tok == settings.get("num_experts_per_tok", 5)


@pytest.mark.parametrize("setting", [{"output_hidden_states": True}, {"output_attentions": True}, {"use_cache": False}])
def test_settings_of_the_dense_model_reach_it_later(setting: dict, saved: dict[str, Path]) -> None:
    dense, converted = (
        AutoModelForCausalLM.from_pretrained(saved[name], attn_implementation="eager") for name in saved
    )
    before = outputs(converted).keys()
    for model in (dense, converted):
        model.config.update(setting)
    assert outputs(converted).keys() == outputs(dense).keys() != before
    model.config.update({name: not value for name, value in setting.items()})
    assert outputs(converted).keys() == before


def test_unknown_settings_are_refused(saved: dict[str, Path]) -> None:
    with pytest.raises(TypeError, match="no_such_setting"):
        AutoModelForCausalLM.from_pretrained(saved["converted"], no_such_setting=1)
    config, unused = AutoConfig.from_pretrained(
        saved["converted"], no_such_setting=1, use_cache=False, return_unused_kwargs=True
    )
    assert unused == {"no_such_setting": 1}
    assert config.dense_config.use_cache is False


def test_sizes_are_equal_in_both_configurations(saved: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(saved["converted"], max_position_embeddings=64)
    assert config.max_position_embeddings == config.dense_config.max_position_embeddings == 64
    config.max_position_embeddings = 32
    assert config.max_position_embeddings == config.dense_config.max_position_embeddings == 32
    assert "max_position_embeddings" not in config.__dict__
