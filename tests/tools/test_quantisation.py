"""Decoders in 8 and 4 bits: head and added tensors are not quantised, and the folder loads again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import (
    QUICK,
    pack_router_of,
    tiny_checkpoint,
    tiny_converted,
    tiny_dense,
    tiny_text,
    tiny_tokenizer,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from hf_topk import InputError, TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert, convert_checkpoint

IDS = torch.tensor([[5, 17, 42, 8, 23]])


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_int4() -> TorchAoConfig:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def bitsandbytes_int8() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "torchao int8": (torchao_int8, "Int8Tensor"),
    "torchao int4": (torchao_int4, "IntxUnpackedToInt8Tensor"),
    "bitsandbytes int8": (bitsandbytes_int8, "Int8Params"),
    "bitsandbytes nf4": (bitsandbytes_nf4, "Params4bit"),
}


def save_converted(folder: Path, tied: bool) -> Path:
    """A model that picks one expert of six, in bfloat16."""
    dense = tiny_dense(tied=tied, hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    pack_router_of(tiny_converted(dense, num_rescored=5, num_experts_per_tok=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_converted(tmp_path_factory.mktemp("quantisation"), tied=True)


def logits_of(model: TopKExpertsForCausalLM) -> dict[str, Tensor]:
    found = {}
    with torch.no_grad():
        for model.head_mode in ("dense", "sparse"):
            found[model.head_mode] = model(IDS).logits
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_decoder_below_an_untouched_head(kind: str, tied: bool, tmp_path: Path) -> None:
    choices, weight_type = KINDS[kind]
    folder = save_converted(tmp_path / "converted", tied)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=choices())
    layers = model.base.model.layers
    linear = [one for one in layers.modules() if isinstance(one, torch.nn.Linear)]
    assert len(linear) == 14
    assert {type(one.weight).__name__ for one in linear} == {weight_type}
    # The head, its router and its tail are to the bit what they were.
    before = plain.head.state_dict()
    after = model.head.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].dtype == tensor.dtype and after[name].equal(tensor) for name, tensor in before.items())
    assert (model.head.weight is model.get_input_embeddings().weight) == tied
    assert model.get_input_embeddings().weight.equal(plain.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "quantised")
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", output_loading_info=True)
    assert not any(found.values())
    assert type(loaded.base.model.layers[1].self_attn.o_proj.weight).__name__ == weight_type
    theirs, ours = logits_of(model), logits_of(loaded)
    assert all(theirs[mode].equal(ours[mode]) for mode in theirs)
    unquantised = logits_of(plain)["dense"]
    assert not theirs["dense"].equal(unquantised)
    likeness = torch.nn.functional.cosine_similarity(theirs["dense"].float(), unquantised.float(), dim=-1)
    assert likeness.min() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_agrees_with_dense_as_before(kind: str, folder: Path) -> None:
    choices, _ = KINDS[kind]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=choices())
    hidden = model.base.model(IDS).last_hidden_state[0]
    found = logits_of(model)
    scored = model.head.score(hidden).ids
    for mode in found:
        assert found[mode].isfinite().all()
    # Of what is scored the logits are the dense ones.
    torch.testing.assert_close(found["sparse"][0].gather(1, scored), found["dense"][0].gather(1, scored))
    whole = AutoModelForCausalLM.from_pretrained(folder, quantization_config=choices(), num_experts_per_tok=6)
    found = logits_of(whole)
    torch.testing.assert_close(found["sparse"], found["dense"])
    choices = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    lossless = model.generate(IDS, lossless=True, **choices)
    model.head_mode = "dense"
    assert lossless.equal(model.generate(IDS, **choices))


@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4"])
def test_a_quantised_folder_loads_as_the_dense_model(kind: str, folder: Path, tmp_path: Path) -> None:
    choices, weight_type = KINDS[kind]
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=choices())
    model.save_pretrained(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path).text_config)
    assert type(dense).__name__ == "LlamaForCausalLM"
    assert type(dense.model.layers[0].mlp.up_proj.weight).__name__ == weight_type
    with torch.no_grad():
        assert dense(IDS).logits.equal(logits_of(model)["dense"])


@pytest.mark.parametrize("kind", ["torchao int8", "torchao int4"])
def test_a_folder_written_by_torchao_is_refused_as_dense_model(kind: str, folder: Path, tmp_path: Path) -> None:
    """Its tensor names are the converted class's; missing tensors must not be initialised at random."""
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind][0]()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path).text_config)


@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes nf4"])
def test_a_quantised_dense_model_is_converted_in_memory_and_refused_as_a_folder(kind: str, tmp_path: Path) -> None:
    choices, weight_type = KINDS[kind]
    tiny_checkpoint(tmp_path / "model", tiny_dense(hidden_size=64, intermediate_size=128).to(torch.bfloat16))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=choices())
    dense.save_pretrained(tmp_path / "quantised")
    with pytest.raises(InputError, match="is quantised: give the checkpoint it was made from"):
        convert_checkpoint(str(tmp_path / "quantised"), tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()
    recipe = Recipe(text=str(tiny_text(tmp_path / "text.jsonl")), num_experts_per_tok=4, **QUICK)
    convert(dense, tiny_tokenizer(), recipe).model.save_pretrained(tmp_path / "out")
    loaded, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    assert type(loaded.base.model.layers[0].mlp.up_proj.weight).__name__ == weight_type
    with torch.no_grad():
        assert logits_of(loaded)["dense"].equal(dense(IDS).logits)


def layer_of_torchao(config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    layers = nn.Sequential(nn.Linear(64, 100)).to(torch.bfloat16)
    quantize_(layers, config)
    return layers[0]


def layer_of_bitsandbytes(kind: str, **choices: Any) -> nn.Module:
    import bitsandbytes

    plain = nn.Linear(64, 100).to(torch.bfloat16)
    layer = getattr(bitsandbytes.nn, kind)(64, 100, **choices)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "torchao int8": lambda: layer_of_torchao(torchao_int8().quant_type),
    "torchao int4": lambda: layer_of_torchao(torchao_int4().quant_type),
    "bitsandbytes int8": lambda: layer_of_bitsandbytes("Linear8bitLt", has_fp16_weights=False),
    "bitsandbytes nf4": lambda: layer_of_bitsandbytes("Linear4bit", quant_type="nf4", compute_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_quantised_linear_layer_becomes_the_head(kind: str) -> None:
    """With its dequantised rows."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    dense = tiny_dense(tied=False, hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    model = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    states = model.base_model(input_ids=IDS).last_hidden_state
    expected = layer(states)
    model.set_output_embeddings(layer)
    assert type(model.head.weight) is nn.Parameter
    logits = model(input_ids=IDS).logits
    assert (logits - expected).float().norm() < 0.02 * expected.float().norm()
    model.head_mode = "dense"
    assert (model(input_ids=IDS).logits - expected).float().norm() < 0.02 * expected.float().norm()
