"""Damaged checkpoints and unsupported models: one clear error each."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.vllm_engine import run_python, save_converted
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.model_executor.models.falcon import FalconForCausalLM
from vllm.model_executor.models.mamba import MambaForCausalLM

from hf_topk import InputError
from hf_topk.vllm_plugin.additions import Additions, names_of_additions
from hf_topk.vllm_plugin.model import check_class

TENSORS = "model.safetensors"


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("lm_head.router.bias", None, "'router.bias' of the head is missing"),
        ("lm_head.expert_ids", None, "'expert_ids' of the head is missing"),
        ("lm_head.tail.bias", torch.zeros(7, 16), r"'tail.bias' of the head is \[7, 16\], config.json says \[6, 16\]"),
        ("lm_head.expert_ids", torch.zeros(6, 16, dtype=torch.long), "not those of a vocabulary of 100"),
    ],
)
def test_additions_of_wrong_shape_are_refused(folder: Path, name: str, to: torch.Tensor | None, message: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = load_file(folder / TENSORS)
    tensors.pop(name)
    if to is not None:
        tensors[name] = to
    additions = Additions(names_of_additions(model.config))
    assert not any(name.startswith("lm_head.") for name, _ in additions.set_aside(tensors.items()))
    with pytest.raises(InputError, match=f"{message}.*convert or fetch the model again"):
        additions.load_into(model.head)


def test_routers_of_the_dense_model_are_passed_on(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    its_own = {f"model.layers.{layer}.mlp.router.bias": torch.ones(3) for layer in range(2)}
    additions = Additions(names_of_additions(model.config))
    rest = dict(additions.set_aside({**its_own, **load_file(folder / TENSORS)}.items()))
    assert rest.items() >= its_own.items()
    assert additions.found.keys() == model.head.additions().keys()


def test_an_incomplete_folder_is_refused_in_one_line(tmp_path: Path, start: Callable[..., Any]) -> None:
    file = save_converted(tmp_path) / TENSORS
    tensors = load_file(file)
    del tensors["lm_head.router.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"'router.bias' of the head is missing.*convert or fetch the model again"):
        start(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path, start: Callable[..., Any]) -> None:
    file = save_converted(tmp_path) / TENSORS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"damaged.*convert or fetch the model again"):
        start(tmp_path)


def test_a_configuration_for_another_vocabulary_size_is_refused(tmp_path: Path, start: Callable[..., Any]) -> None:
    save_converted(tmp_path)
    with pytest.raises(InputError, match="do not cover a vocabulary of 100"):
        start(tmp_path, hf_overrides={"num_experts": 3})


def test_a_head_of_another_dtype_is_refused(folder: Path, start: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r'head_dtype.*"head_mode": "dense"'):
        start(folder, hf_overrides={"head_dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("dense_class", "model_type", "message"),
    [
        (MambaForCausalLM, "mamba", "{} has a state besides"),
        (type("TakesImages", (nn.Module,), {"supports_multimodal": True}), "some", "{} takes images"),
        (FalconForCausalLM, "falcon", "settings of its own for {}"),
    ],
)
def test_unsupported_models_are_refused(dense_class: Any, model_type: str, message: str) -> None:
    config = SimpleNamespace(model_type=model_type, architectures=[dense_class.__name__])
    model_config = SimpleNamespace(hf_config=config)
    with pytest.raises(InputError, match=message.format(dense_class.__name__)):
        check_class(dense_class, SimpleNamespace(model_config=model_config))


def test_without_the_plugin_vllm_refuses_the_folder(folder: Path) -> None:
    said = run_python(f"from vllm import LLM; LLM({str(folder)!r})", VLLM_PLUGINS="")
    assert said.returncode != 0
    assert "trust_remote_code=True" in said.stderr
