"""Converted models without this package: the code in their folder."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from support.bare_environment import python_without_the_package
from support.tiny_models import QUICK, tiny_checkpoint, tiny_text
from transformers import AutoModelForCausalLM

from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.model import configuration_topk_experts

LOAD = """
import importlib.util, json, pathlib, sys
assert importlib.util.find_spec("hf_topk") is None
sys.modules["triton"] = None  # as if it was not installed either

import torch
from transformers import AutoConfig, AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
prompt = torch.arange(4).unsqueeze(0)
choices = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
tokens = {"lossless": model.generate(prompt, lossless=True, **choices)[0].tolist()}
stats = model.last_generation_stats
for model.head_mode in ("sparse", "dense"):
    tokens[model.head_mode] = model.generate(prompt, **choices)[0].tolist()
file = pathlib.Path(folder, "generation_config.json")
before = file.read_text()
file.write_text(json.dumps({**json.loads(before), "lossless": True}))
by_default = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
file.write_text(before)
tokens["by default"] = by_default.generate(prompt, **choices)[0].tolist()
dense = AutoModelForCausalLM.from_pretrained(folder, config=model.config.text_config)
print(json.dumps({"module": type(model).__module__, "dense": type(dense).__name__, "tokens": tokens,
                  "passes": stats.dense_passes, "new": stats.tokens,
                  "passes by default": by_default.last_generation_stats.dense_passes}))
"""


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    tiny_checkpoint(tmp_path / "model")
    recipe = Recipe(text=str(tiny_text(tmp_path / "text.jsonl")), num_experts_per_tok=4, **QUICK)
    convert_checkpoint(str(tmp_path / "model"), tmp_path / "out", recipe)
    return tmp_path / "out"


def check_loads_without_the_package(folder: Path, modules: Path) -> None:
    assert (folder / "triton_kernels.py").is_file()  # nothing imports it before it is needed
    python = python_without_the_package(modules.with_name("bare"))
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    command = [str(python), "-c", LOAD, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder.parent, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["module"].startswith("transformers_modules.")
    assert found["dense"] == "LlamaForCausalLM"
    assert found["tokens"]["lossless"] == found["tokens"]["dense"]
    assert found["tokens"]["by default"] == found["tokens"]["dense"]
    assert found["passes"] == found["passes by default"] < found["new"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__ == "hf_topk.model.modeling_topk_experts"  # which wins where it is installed
    model.head_mode = "sparse"
    tokens = model.generate(torch.arange(4).unsqueeze(0), max_new_tokens=12, eos_token_id=None, pad_token_id=1)
    assert found["tokens"]["sparse"] == tokens[0].tolist()


def test_loads_with_its_own_code(converted: Path, tmp_path: Path) -> None:
    check_loads_without_the_package(converted, tmp_path / "modules")


@pytest.mark.slow
def test_a_saved_model_contains_its_code(converted: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(converted).save_pretrained(tmp_path / "saved")
    check_loads_without_the_package(tmp_path / "saved", tmp_path / "modules")
    own = {file.name for file in Path(configuration_topk_experts.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert {file.name for file in (tmp_path / "saved").glob("*.py")} == own
