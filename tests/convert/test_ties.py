"""Ties of head and input embeddings, and configurations that contradict them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import check_refused
from support.image_models import tiny_llava
from support.tiny_models import QUICK, tiny_checkpoint, tiny_converted, tiny_dense, tiny_text, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from hf_topk import InputError
from hf_topk.convert import Recipe, convert, pipeline
from hf_topk.convert.run import convert_checkpoint
from studies.architectures import check_conversion
from studies.tiny_models import PROBE, tiny_model

# By the top of a configuration, by its part about text, which the top is read off, and by that part alone.
TIED = {
    "llama": tiny_dense,
    "gpt2": lambda: tiny_dense("gpt2"),
    "llava": lambda: tie(tiny_llava()[0]),
    "llama4": lambda: tie(tiny_model(AutoModelForImageTextToText, "llama4")),
}


def tie(dense: PreTrainedModel) -> PreTrainedModel:
    config = dense.config
    config.text_config.tie_word_embeddings = True
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config.to_dict())).eval()


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def with_a_head_of_its_own(name: str) -> PreTrainedModel:
    dense = TIED[name]()
    assert is_tied(dense)
    head = dense.get_output_embeddings()
    head.weight = nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(7)))
    return dense


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=PROBE).logits


def check_same(model: Any, expected: Tensor) -> None:
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-3, atol=1e-3)


def converted(folder: Path, out: Path) -> Any:
    """The model that the command converts, loaded, with all experts picked."""
    recipe = Recipe(**QUICK, text=str(tiny_text(folder.parent / "text.jsonl")), target_agreement=None)
    convert_checkpoint(str(folder), out, recipe)
    model = AutoModelForCausalLM.from_pretrained(out)
    model.num_experts_per_tok, model.head_mode = model.head.num_experts, "sparse"
    return model


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in TIED if name != "llama")]
)
def test_tied_config_with_a_head_of_its_own_on_disk(name: str, tmp_path: Path) -> None:
    """Converted from a folder, saved again, and loaded as the dense model, each time untied."""
    dense = with_a_head_of_its_own(name)
    check_conversion(dense, tmp_path)
    written = json.loads((tmp_path / "converted" / "config.json").read_text())["text_config"]
    assert not any(part.get("tie_word_embeddings") for part in (written, written.get("text_config", {})))


@pytest.mark.parametrize("name", TIED)
def test_tied_config_with_a_head_of_its_own_in_memory(name: str, tmp_path: Path) -> None:
    dense = with_a_head_of_its_own(name)
    expected, config = logits_of(dense), dense.config.to_dict()
    text = tiny_text(tmp_path / "text.jsonl")
    model = convert(dense, tiny_tokenizer(), Recipe(**QUICK, text=str(text))).model
    model.num_experts_per_tok, model.head_mode = model.head.num_experts, "sparse"
    check_same(model, expected)
    model.tie_weights()  # as Transformers does after this and that
    check_same(model, expected)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    check_same(loaded, expected)
    loaded.resize_token_embeddings(104)
    torch.testing.assert_close(logits_of(loaded)[..., :100], expected, rtol=1e-3, atol=1e-3)
    assert not is_tied(loaded)
    assert dense.config.to_dict() == config


def test_redundant_head_in_a_tied_checkpoint(tmp_path: Path) -> None:
    dense = tiny_dense()
    weights = tiny_checkpoint(tmp_path / "dense", dense) / "model.safetensors"
    tensors = load_file(weights)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights, {"format": "pt"})
    model = converted(tmp_path / "dense", tmp_path / "out")
    assert is_tied(model)
    check_same(model, logits_of(dense))
    as_dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=model.config.text_config)
    assert is_tied(as_dense)
    check_same(as_dense, logits_of(dense))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_untied_config_without_a_head(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only Gemma 3's text configuration, which it ignores, ties them."""
    monkeypatch.chdir(tmp_path)
    dense = tiny_dense(tied=False) if name == "llama" else tiny_model(AutoModelForImageTextToText, name)
    tiny_checkpoint(Path("dense"), dense)
    config = json.loads(Path("dense/config.json").read_text()) | {"tie_word_embeddings": False}
    if name == "gemma3":
        assert config["text_config"]["tie_word_embeddings"]
    Path("dense/config.json").write_text(json.dumps(config))
    tensors = load_file("dense/model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file(tensors, "dense/model.safetensors", {"format": "pt"})
    tiny_text(Path("text.jsonl"))
    parts = ("dense has no head ('lm_head.weight' is missing)", "set `tie_word_embeddings` to true in config.json")
    check_refused(monkeypatch, capsys, "convert", "dense", "out", "--text", "text.jsonl", parts=parts)
    Path("dense/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = converted(Path("dense"), Path("out"))
    assert is_tied(model)
    check_same(model, logits_of(type(dense).from_pretrained("dense")))


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_tied_by_hand_although_the_config_is_untied(name: str, tmp_path: Path) -> None:
    dense = tiny_dense(tied=False) if name == "llama" else tiny_llava()[0]
    dense.get_output_embeddings().weight = dense.get_input_embeddings().weight
    model = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    check_same(model, logits_of(dense))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_tied(loaded)
    check_same(loaded, logits_of(dense))


def test_ties_that_no_configuration_expresses_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pipeline, "collect", lambda *_: pytest.fail("hidden states were collected"))
    recipe = Recipe(**QUICK, text=str(tiny_text(tmp_path / "text.jsonl")))
    bert = tiny_dense("bert", is_decoder=True)
    bert.get_output_embeddings().weight = nn.Parameter(torch.randn(100, 32))
    xlstm = tiny_model(AutoModelForCausalLM, "xlstm")  # whose class never ties
    xlstm.get_output_embeddings().weight = xlstm.get_input_embeddings().weight
    with pytest.raises(InputError, match=r"ties 'cls\.predictions\.decoder\.bias' by the same entry"):
        convert(bert, tiny_tokenizer(), recipe)
    with pytest.raises(InputError, match=r"one tensor, .*: give its head a copy of its own"):
        convert(xlstm, tiny_tokenizer(), recipe)
