"""`torch.export` with static shapes: the exported program gives the model's logits, without this package."""

import io
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_converted, tiny_dense
from torch import Tensor
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    convert_and_export_with_cache,
)

from hf_topk import TopKExpertsForCausalLM

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 17, 42, 8, 23]])
ROUNDED = {"rtol": 2e-2, "atol": 6e-2}  # estimates, which eager code rounds to bfloat16
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8},
}


def convert(model_type: str = "llama", **choices: Any) -> TopKExpertsForCausalLM:
    dense = tiny_dense(model_type, tied=False, **MODELS[model_type])
    return tiny_converted(dense, **{"num_rescored": 5, "router_packed": True, "head_mode": "sparse", **choices})


def written_and_read(program: torch.export.ExportedProgram) -> Any:
    """The exported program, saved and loaded."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(
    ("mode", "num_rescored", "combine", "length"),
    [
        ("sparse", 5, "exact", 1),
        ("sparse", 256, "exact", 5),
        ("sparse", 256, "router", 5),
        ("sparse", 256, "learned", 1),
        ("dense", 5, "exact", 5),
    ],
)
def test_forward_pass_without_a_cache(mode: str, num_rescored: int, combine: str, length: int) -> None:
    model = convert(num_rescored=num_rescored, combine=combine, head_mode=mode)
    example = {"input_ids": IDS[:, :length], "attention_mask": torch.ones(1, length, dtype=torch.long)}
    with torch.no_grad():
        program = torch.export.export(model, (), {**example, "use_cache": False})
        for shift in range(3):
            inputs = {**example, "input_ids": IDS[:, :length] + shift, "use_cache": False}
            torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits, **ROUNDED)


def test_exported_auto_is_decided_by_the_exported_shape() -> None:
    model = convert(head_mode="auto", sparse_max_positions=1)
    found = {}
    with torch.no_grad():
        for length in (1, 5):
            inputs = {"input_ids": IDS[:, :length], "use_cache": False}
            found[length] = torch.export.export(model, (), inputs).module()(**inputs).logits
        for length, mode in ((1, "sparse"), (5, "dense")):
            model.head_mode = mode
            torch.testing.assert_close(found[length], model(IDS[:, :length], use_cache=False).logits, **ROUNDED)


@pytest.mark.parametrize(("model_type", "mode"), [("llama", "sparse"), ("llama", "dense"), ("gemma3_text", "sparse")])
def test_decoding_with_a_static_cache(model_type: str, mode: str) -> None:
    model = convert(model_type, head_mode=mode)
    expected = model.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    model.generation_config.cache_implementation = "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 16}
    # One module for all steps: each call of `module()` has a cache of its own.
    step = convert_and_export_with_cache(model, strict=False).module()
    tokens = IDS[0].tolist()
    for position in range(7):
        logits = step(input_ids=torch.tensor([[tokens[position]]]), cache_position=torch.tensor([position]))
        if position >= 4:
            tokens.append(int(logits.argmax()))
    assert tokens == expected[0].tolist()


def test_prefill_of_a_static_cache() -> None:
    model = convert()
    model.generation_config.cache_implementation = "static"
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16)
    with torch.no_grad():
        prompt = exportable.export(input_ids=IDS, cache_position=torch.arange(5), strict=False)
        found: Tensor = written_and_read(prompt)(input_ids=IDS, cache_position=torch.arange(5))
        torch.testing.assert_close(found, model(IDS).logits, **ROUNDED)
