"""The entry point registers the model, and changes nothing of vLLM's."""

import vllm
from support.vllm_engine import run_python
from vllm.plugins import load_plugins_by_group

from hf_topk.vllm_plugin import ARCHITECTURE, register


def test_vllm_finds_it() -> None:
    assert load_plugins_by_group("vllm.general_plugins")["hf_topk"] is register


def test_registering_again_changes_nothing() -> None:
    register()
    before = vllm.ModelRegistry.models[ARCHITECTURE]
    register()
    assert vllm.ModelRegistry.models[ARCHITECTURE] == before


def test_nothing_of_vllm_is_imported_before_it_is_used() -> None:
    code = "import sys, hf_topk.vllm_plugin; print(sys.modules.keys() & {'vllm', 'prometheus_client'})"
    assert run_python(code).stdout.strip() == "set()"


def test_no_class_of_vllm_is_changed() -> None:
    names = (
        ("vllm.model_executor.layers.logits_processor", "LogitsProcessor"),
        ("vllm.model_executor.layers.vocab_parallel_embedding", "ParallelLMHead"),
        ("vllm.model_executor.models.llama", "LlamaForCausalLM"),
        ("vllm.v1.sample.sampler", "Sampler"),
    )
    code = f"""
import importlib
from vllm.model_executor.custom_op import op_registry_oot
classes = [getattr(importlib.import_module(module), name) for module, name in {names}]
before = [dict(vars(one)) for one in classes]
from hf_topk.vllm_plugin import register, model
register()
print([dict(vars(one)) for one in classes] == before, dict(op_registry_oot))
"""
    assert run_python(code).stdout.split("\\n")[-1].strip().endswith("True {}")
