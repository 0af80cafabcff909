"""Models sharded over several processes: the tokens of one process, or an error of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.heads import make_head, make_hidden
from support.tiny_models import tiny_converted, tiny_dense
from torch import nn

from hf_topk import InputError, TopKExpertsForCausalLM, TopKExpertsHead

PROMPT = torch.arange(4).unsqueeze(0)
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 2},
    "lossless": {"do_sample": False, "lossless": True},
}
# What runs here and in each of two processes: the tokens of every way, in every head mode.
TOKENS = """
import torch

def tokens_of(model, ways):
    found, prompt = {}, torch.arange(4).unsqueeze(0)
    for model.head_mode in ("sparse", "dense", "auto"):
        for way, choices in ways.items():
            torch.manual_seed(0)
            tokens = model.generate(prompt, max_new_tokens=5, eos_token_id=None, pad_token_id=1, **choices)
            found[f"{model.head_mode}, {way}"] = tokens[0].tolist()
    return found
"""
IN_PARTS = (
    TOKENS
    + """
import json, sys
import hf_topk
from hf_topk.model import crossover
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

crossover.least_seconds = None  # each process would find something else
ways = json.loads(sys.argv[1])
torch.distributed.init_process_group("gloo")

def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder)

def sharded(folder, *parts):
    model = whole(folder)
    for part in parts:
        fully_shard(model.get_submodule(part))
    fully_shard(model)
    return model

def distributed(folder, **choices):
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**choices))

def refusal(model):
    model.head_mode = "sparse"
    try:
        model.generate(torch.arange(4).unsqueeze(0), max_new_tokens=1, do_sample=False, pad_token_id=1)
    except hf_topk.InputError as error:
        return str(error)

found = {}
for folder in ("tied", "untied"):
    made = {
        "tp_plan": AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto"),
        "distributed_config": distributed(folder, tp_size=2, tp_plan="auto"),
        "fsdp_size": distributed(folder, fsdp_size=2),
        "fully_shard": sharded(folder, "base.model.layers.0", "base.model.layers.1"),
    }
    if folder == "untied":  # FSDP itself refuses to shard tied tensors twice
        made["fully_shard of the head"] = sharded(folder, "base.lm_head")
    for name, model in made.items():
        found[f"{folder}, {name}"] = tokens_of(model, ways)
split = distributed("untied", tp_size=2, tp_plan={"base.lm_head": "colwise_gather_output"})
found = {"tokens": found, "refusal": refusal(split)}
with open(f"{torch.distributed.get_rank()}.json", "w") as file:
    json.dump(found, file)
torch.distributed.destroy_process_group()
"""
)


def tokens_of(model: TopKExpertsForCausalLM) -> dict[str, list[int]]:
    scope: dict[str, Any] = {}
    exec(TOKENS, scope)
    return scope["tokens_of"](model, WAYS)


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one(tmp_path: Path) -> None:
    models = {"tied": tiny_converted(), "untied": tiny_converted(tiny_dense(tied=False))}
    for name, model in models.items():
        model.config.sparse_max_positions = None
        model.save_pretrained(tmp_path / name)
    (tmp_path / "in_parts.py").write_text(IN_PARTS, encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("in_parts.py", json.dumps(WAYS)),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found["tokens"]) == 9
        for name, tokens in found["tokens"].items():
            model = models[name.partition(",")[0]]
            model.config.sparse_max_positions = 4  # as is guessed where several processes run
            assert tokens == tokens_of(model), name
        assert "this one has a part of shape [50, 32] of [100, 32]" in found["refusal"]
        assert "exclude the head" in found["refusal"]


# DeepSpeed's ZeRO stage 3 leaves empty tensors, and gathers those of a module while the module runs


def shard(parameter: nn.Parameter) -> None:
    parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
    parameter.data = torch.empty(0, dtype=parameter.dtype)


def as_zero3_leaves(model: nn.Module) -> None:
    values = {parameter: parameter.data for parameter in model.parameters()}
    for module in model.modules():
        own = list(module.parameters(recurse=False))

        def gather(module: nn.Module, inputs: Any, own: list[nn.Parameter] = own) -> None:
            for parameter in own:
                parameter.data = values[parameter]

        def release(module: nn.Module, inputs: Any, output: Any, own: list[nn.Parameter] = own) -> None:
            for parameter in own:
                shard(parameter)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    for parameter, value in values.items():
        parameter.ds_shape = value.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0, dtype=value.dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_zero_stage_3_gives_the_same_tokens(tied: bool) -> None:
    model = tiny_converted(tiny_dense(tied=tied), combine="learned", num_rescored=8)
    expected = tokens_of(model)
    as_zero3_leaves(model)
    assert model.head.weight.shape == (0,)
    assert tokens_of(model) == expected


@pytest.mark.parametrize("run", ["score", "sparse_logits", "dense_logits"])
def test_a_head_of_empty_shards_is_refused_in_one_line(run: str) -> None:
    head = tiny_converted(tiny_dense(tied=False)).head
    shard(head.weight)
    with pytest.raises(InputError, match=r"a part of shape \[0\] of \[100, 32\]: .* ZeRO stage 2"):
        getattr(head, run)(make_hidden(0, 2))


def test_joint_training_of_a_head_of_empty_shards_is_refused() -> None:
    model = tiny_converted(tiny_dense(tied=False)).train()
    as_zero3_leaves(model)
    with pytest.raises(InputError, match="ZeRO stage 2"), model.joint_training():
        model(input_ids=PROMPT, labels=PROMPT)


def test_the_sizes_of_empty_shards_are_found() -> None:
    dense, head = tiny_dense(tied=False), make_head()
    shard(dense.get_output_embeddings().weight)
    with torch.device("meta"):
        built = TopKExpertsHead(dense.get_output_embeddings(), head.config)
    assert (built.out_features, built.in_features) == (100, 32)
    grown = nn.Linear(32, 103, bias=False)
    shard(grown.weight)
    head.take_over(grown)
    assert head.out_features == 103
    assert head.always_on_ids[-3:].tolist() == [100, 101, 102]
