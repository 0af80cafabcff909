"""The converted model: sharing, saving, resizing, imports and compilation."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import VOCAB_SIZE, tiny_converted, tiny_dense, with_cache
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_topk import InputError, TopKExpertsConfig, TopKExpertsForCausalLM, TopKExpertsHead

ROUNDED = {"rtol": 2e-2, "atol": 6e-2}  # estimates, which eager code rounds to bfloat16
PROMPT = torch.tensor([[5, 17, 42, 8, 23], [99, 3, 64, 2, 77]])


@torch.no_grad()
def logits_of(model: Any, prompt: Tensor = PROMPT) -> Tensor:
    return model(input_ids=prompt).logits


def save_and_load(model: PreTrainedModel, folder: Path) -> TopKExpertsForCausalLM:
    model.save_pretrained(folder)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return loaded


# In memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_dense_model_is_shared_and_unchanged(model_type: str, tied: bool, dtype: torch.dtype) -> None:
    dense = tiny_dense(model_type, tied=tied).to(dtype)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    modules, config, expected = [type(module) for module in dense.modules()], dense.config.to_dict(), logits_of(dense)
    converted = tiny_converted(dense)
    theirs = dict(dense.named_parameters())
    assert all(theirs[name] is tensor for name, tensor in converted.base.named_parameters() if name in theirs)
    assert theirs.keys() <= dict(converted.base.named_parameters()).keys()
    converted.head_mode = "sparse"
    logits_of(converted)
    assert [type(module) for module in dense.modules()] == modules
    assert dense.config.to_dict() == config
    assert all(tensor.equal(before[name]) for name, tensor in dense.state_dict().items())
    assert dense.state_dict().keys() == before.keys()
    assert logits_of(dense).equal(expected)
    assert converted.dtype == converted.config.dtype == dtype
    assert not converted.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_tied_embeddings_stay_tied(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def check(model: TopKExpertsForCausalLM) -> None:
        rows, embeddings = model.head.weight, model.get_input_embeddings().weight
        assert rows is embeddings
        assert rows.dtype == dtype
        assert model.get_output_embeddings() is model.head

    converted = tiny_converted(tiny_dense(model_type).to(dtype))
    check(converted)
    loaded = save_and_load(converted, tmp_path / "first")
    check(loaded)
    check(save_and_load(loaded, tmp_path / "second"))
    shapes = [list(tensor.shape) for tensor in load_file(tmp_path / "second" / "model.safetensors").values()]
    assert shapes.count([VOCAB_SIZE, 32]) == 1
    # A change to the one is a change to the other.
    with torch.no_grad():
        loaded.get_input_embeddings().weight[7] = 3
    assert (loaded.head.weight[7] == 3).all()


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_on_disk(tied: bool, tmp_path: Path) -> None:
    """Dense tensors keep their names, dtypes and bytes; the folder still loads as the dense model."""
    tiny_dense(tied=tied).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.dtype == torch.bfloat16
    converted = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    loaded = save_and_load(converted, tmp_path / "out")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    assert theirs.keys() < ours.keys()
    assert all(ours[name].equal(tensor) and ours[name].dtype == torch.bfloat16 for name, tensor in theirs.items())
    torch.testing.assert_close(logits_of(loaded), logits_of(dense), rtol=2e-2, atol=6e-2)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", config=AutoConfig.from_pretrained(tmp_path / "out").text_config
    )
    assert type(again) is type(dense)
    assert again.dtype == torch.bfloat16
    assert logits_of(again).equal(logits_of(dense))


@pytest.mark.parametrize("tied", [True, False])
def test_old_names_without_the_model_s_prefix(tied: bool, tmp_path: Path) -> None:
    """Old GPT-2 checkpoints name their tensors as the model without a head does."""
    dense = tiny_dense("gpt2", tied=tied)
    converted = tiny_converted(dense, num_experts_per_tok=6, head_mode="sparse")
    converted.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in ours.items()}
    assert bare.keys() != ours.keys()
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits_of(loaded), logits_of(dense), rtol=1e-5, atol=1e-4)
    as_dense, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=AutoConfig.from_pretrained(tmp_path).text_config, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert logits_of(as_dense).equal(logits_of(dense))
    # Saved again it loads again, and every tensor is there under one name.
    again = save_and_load(loaded, tmp_path / "again")
    assert logits_of(again).equal(logits_of(loaded))
    names = load_file(tmp_path / "again" / "model.safetensors").keys()
    assert {name.removeprefix("transformer.") for name in names} == bare.keys()
    assert len(names) == len(bare)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_user_mappings_of_names_are_applied(model_type: str, tmp_path: Path) -> None:
    converted = tiny_converted(tiny_dense(model_type))
    converted.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({f"mine.{name}": tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, key_mapping={r"^mine\.": ""}, output_loading_info=True
    )
    assert not any(info.values())
    assert logits_of(loaded).equal(logits_of(converted))


def test_additions_load_from_a_separate_shard(tmp_path: Path) -> None:
    """The dense checkpoint's own file, a second one with the added tensors, and an index."""
    dense = tiny_dense(tied=False)
    converted = tiny_converted(dense)
    converted.save_pretrained(tmp_path)
    dense.save_pretrained(tmp_path / "dense")
    ours, theirs = load_file(tmp_path / "model.safetensors"), tmp_path / "dense" / "model.safetensors"
    (tmp_path / "model.safetensors").unlink()
    theirs.rename(tmp_path / "model-00001-of-00002.safetensors")
    dense_names = load_file(tmp_path / "model-00001-of-00002.safetensors").keys()
    added = {name: tensor for name, tensor in ours.items() if name not in dense_names}
    save_file(added, tmp_path / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    where = {name: f"model-0000{1 + (name in added)}-of-00002.safetensors" for name in ours}
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert logits_of(loaded).equal(logits_of(converted))


@pytest.mark.parametrize("router_packed", [False, True])
@pytest.mark.parametrize("num_rescored", [5, 256])
@pytest.mark.parametrize("combine", ["exact", "router", "learned"])
def test_every_kind_of_head_reloads(router_packed: bool, num_rescored: int, combine: str, tmp_path: Path) -> None:
    choices = {"router_packed": router_packed, "num_rescored": num_rescored, "combine": combine}
    converted = tiny_converted(**choices, head_mode="sparse")
    if combine == "learned":
        nn.init.normal_(converted.head.combiner.gate)
    loaded = save_and_load(converted, tmp_path)
    assert loaded.head_mode == "sparse"
    assert loaded.head.screens == converted.head.screens == (num_rescored == 5 and combine == "exact")
    # Not bit for bit: where tensors lie in memory, which loading changes, some processors sum in another order.
    torch.testing.assert_close(logits_of(loaded), logits_of(converted), rtol=1e-5, atol=1e-5)


# Head modes


def test_head_mode_is_set_and_saved(tmp_path: Path) -> None:
    converted = tiny_converted()
    assert converted.head_mode == "auto"
    for mode in ("sparse", "dense", "auto"):
        converted.head_mode = mode
        assert converted.head_mode == converted.head.head_mode == mode
        assert save_and_load(converted, tmp_path / mode).head_mode == mode


def test_unknown_head_mode_is_refused() -> None:
    converted = tiny_converted(head_mode="sparse")
    with pytest.raises(InputError, match=r"'fast'.*auto, sparse, dense"):
        converted.head_mode = "fast"
    assert converted.head_mode == "sparse"


def test_k_and_r_are_set_and_saved(tmp_path: Path) -> None:
    converted = tiny_converted(head_mode="sparse")
    two = logits_of(converted)
    converted.num_experts_per_tok, converted.num_rescored, converted.sparse_max_positions = 5, 7, 0
    assert converted.head.num_experts_per_tok == converted.config.num_experts_per_tok == 5
    assert converted.head.num_rescored == converted.config.num_rescored == 7
    assert converted.head.sparse_max_positions == converted.config.sparse_max_positions == 0
    assert not logits_of(converted).equal(two)
    again = save_and_load(converted, tmp_path)
    assert (again.num_experts_per_tok, again.num_rescored, again.sparse_max_positions) == (5, 7, 0)
    assert logits_of(again).equal(logits_of(converted))


def test_changes_of_a_loaded_model_s_configuration_take_effect() -> None:
    """As users set `num_experts_per_tok` of mixtures of experts."""
    converted, other = tiny_converted(head_mode="sparse"), tiny_converted(head_mode="sparse")
    converted.config.num_experts_per_tok = other.num_experts_per_tok = 5
    assert converted.num_experts_per_tok == converted.head.num_experts_per_tok == 5
    assert logits_of(converted).equal(logits_of(other))
    converted.config.num_rescored = other.head.num_rescored = 7
    assert converted.head.num_rescored == other.config.num_rescored == 7
    assert logits_of(converted).equal(logits_of(other))
    converted.config.head_mode = other.head_mode = "dense"
    assert logits_of(converted).equal(logits_of(other))
    for name, value in (("num_experts_per_tok", 7), ("num_rescored", 0), ("sparse_max_positions", -1)):
        before = getattr(converted.config, name)
        with pytest.raises(InputError, match=f"{name} is {value}"):
            setattr(converted.config, name, value)
        assert getattr(converted.config, name) == before


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("num_experts_per_tok", 0, "is 0, must be from 1 to the 6 experts"),
        ("num_experts_per_tok", 7, "is 7, must be from 1 to the 6 experts"),
        ("sparse_max_positions", -1, "is -1, cannot be negative"),
    ],
)
def test_k_and_r_are_bounded(name: str, value: int, cause: str) -> None:
    converted = tiny_converted()
    before = getattr(converted, name)
    with pytest.raises(InputError, match=f"{name} {cause}"):
        setattr(converted, name, value)
    assert getattr(converted, name) == getattr(converted.head, name) == getattr(converted.config, name) == before


def test_an_unknown_argument_is_passed_on_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    converted = tiny_converted()
    forward = converted.base.forward
    monkeypatch.setattr(converted.base, "forward", lambda input_ids, logits_to_keep: forward(input_ids))
    assert converted(PROMPT).logits.shape[:2] == PROMPT.shape
    with pytest.raises(TypeError, match="position_ids"):
        converted(PROMPT, position_ids=PROMPT)


@torch.no_grad()
def test_auto_counts_the_positions_of_a_call() -> None:
    dense = tiny_dense()
    converted = tiny_converted(dense, sparse_max_positions=4)
    assert logits_of(converted).equal(logits_of(dense))  # ten positions
    two = PROMPT[:, :2]
    assert not torch.allclose(logits_of(converted, two), logits_of(dense, two), atol=1e-2)
    last = converted(input_ids=PROMPT, logits_to_keep=1).logits  # two positions
    assert last.shape == (2, 1, VOCAB_SIZE)
    assert not torch.allclose(last, logits_of(dense)[:, -1:], atol=1e-2)


# Refusals


def test_model_without_a_vocabulary_head_is_refused() -> None:
    dense = tiny_dense()
    with pytest.raises(InputError, match="LlamaModel has no single vocabulary head"):
        TopKExpertsForCausalLM.from_dense(dense.model, TopKExpertsConfig())
    config = TopKExpertsConfig(text_config={"model_type": "vit"})
    with pytest.raises(InputError, match="'vit'"):
        TopKExpertsForCausalLM(config)


def test_head_that_is_not_linear_is_refused() -> None:
    dense = copy.deepcopy(tiny_dense())
    dense.lm_head = nn.Bilinear(32, 32, VOCAB_SIZE)
    with pytest.raises(InputError, match="Bilinear, not a plain linear layer"):
        TopKExpertsForCausalLM.from_dense(dense, TopKExpertsConfig())


# Resizing


@pytest.mark.parametrize("vocab_size", [70, 99, 100, 103, 128])
@pytest.mark.parametrize("num_rescored", [5, 256])
@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("phi", False)])
def test_resized_embeddings(model_type: str, tied: bool, num_rescored: int, vocab_size: int, tmp_path: Path) -> None:
    dense = copy.deepcopy(tiny_dense(model_type, tied=tied, bias=model_type == "phi"))
    converted = tiny_converted(dense, num_rescored=num_rescored, num_experts_per_tok=6, head_mode="sparse")
    always = converted.head.always_on_ids.tolist()
    converted.resize_token_embeddings(vocab_size, mean_resizing=False)
    prompt = PROMPT.clamp_max(vocab_size - 1)

    def check(model: TopKExpertsForCausalLM) -> None:
        head = model.head
        assert isinstance(head, TopKExpertsHead)
        assert head.weight.shape == (vocab_size, 32)
        assert (model.get_input_embeddings().weight is head.weight) == tied
        assert model.config.text_config.vocab_size == vocab_size
        kept = [number for number in always if number < vocab_size]
        assert head.always_on_ids.tolist() == kept + list(range(VOCAB_SIZE, vocab_size))
        assert model.config.num_always_on == head.num_always_on
        sparse = logits_of(model, prompt)
        model.head_mode = "dense"
        torch.testing.assert_close(sparse, logits_of(model, prompt), rtol=1e-5, atol=1e-4)
        model.head_mode = "sparse"

    check(converted)
    check(save_and_load(converted, tmp_path))
    converted.head.num_experts_per_tok = 2
    logits = logits_of(converted, prompt)
    assert logits.isfinite().all()
    assert converted.generate(prompt, max_new_tokens=3, do_sample=False).max() < vocab_size


# Imports


def test_importing_the_runtime_imports_no_converter() -> None:
    """Apart from the modules that Transformers imports itself."""
    code = """
import sys
import torch, transformers.conversion_mapping, transformers.core_model_loading
from transformers import AutoModelForCausalLM, AutoConfig, GenerationMixin, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from huggingface_hub.dataclasses import strict
before = set(sys.modules)
import hf_topk
config = hf_topk.TopKExpertsConfig(text_config={"model_type": "llama", "hidden_size": 32, "intermediate_size": 8,
    "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 1024}, num_experts=64)
model = AutoModelForCausalLM.from_config(config)
model.generate(torch.tensor([[5]]), max_new_tokens=2, pad_token_id=0)
print(*sorted(set(sys.modules) - before), sep="\\n")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    imported = run.stdout.split()
    assert "hf_topk.model.head" in imported
    for name in ("sklearn", "datasets", "typer", "rich", "yaml", "jinja2", "pyarrow", "hf_topk.convert", "hf_topk.cli"):
        assert not [module for module in imported if module == name or module.startswith(f"{name}.")]


# Compilation


@pytest.mark.parametrize(
    ("num_rescored", "combine", "backend"),
    [
        (5, "exact", "eager"),
        pytest.param(5, "exact", "aot_eager", marks=pytest.mark.slow),
        pytest.param(256, "exact", "aot_eager", marks=pytest.mark.slow),
        (256, "router", "eager"),
        pytest.param(256, "learned", "aot_eager", marks=pytest.mark.slow),
        (256, "learned", "eager"),
    ],
)
@pytest.mark.parametrize("router_packed", [False, True])
@pytest.mark.parametrize("num_always_on", [8, 4])  # the last expert is short, or full
def test_sparse_head_compiles_to_one_graph(
    num_rescored: int, combine: str, backend: str, router_packed: bool, num_always_on: int
) -> None:
    torch.compiler.reset()
    choices = {"num_rescored": num_rescored, "combine": combine, "num_always_on": num_always_on}
    head = tiny_converted(**choices, router_packed=router_packed, head_mode="sparse").head
    compiled = torch.compile(head, fullgraph=True, dynamic=False, backend=backend)
    for positions in (1, 3):
        hidden = torch.randn(positions, 1, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(compiled(hidden), head(hidden), **ROUNDED)


@pytest.mark.parametrize(
    ("num_rescored", "mode"),
    [
        (5, "auto"),
        (5, "sparse"),
        pytest.param(256, "auto", marks=pytest.mark.slow),
        pytest.param(256, "sparse", marks=pytest.mark.slow),
        pytest.param(5, "dense", marks=pytest.mark.slow),
    ],
)
def test_decode_step_compiles_to_one_graph(num_rescored: int, mode: str) -> None:
    torch.compiler.reset()
    model = tiny_converted(num_rescored=num_rescored, router_packed=True, head_mode=mode)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        past = model(input_ids=PROMPT, use_cache=True).past_key_values
        step = {"input_ids": torch.tensor([[4], [5]]), "logits_to_keep": 1}
        expected = model(**step, **with_cache(copy.deepcopy(past))).logits
        torch.testing.assert_close(compiled(**step, **with_cache(past)).logits, expected, rtol=1e-5, atol=1e-4)
