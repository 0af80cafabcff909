"""accelerate: offloading to RAM and disk, and training with several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import pack_router_of, tiny_converted, tiny_dense
from transformers import AutoModelForCausalLM

PROMPT = torch.tensor([[5, 17, 42, 8, 23, 61]])
CHOICES: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
LAUNCH = (
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 "
    "--mixed_precision no --dynamo_backend no"
)
TRAIN = """
import json
from contextlib import nullcontext

import hf_topk
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

NAMES = ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "lm_head.router.bias", "lm_head.router.codes_4bit")
accelerator = Accelerator()
inputs = torch.randint(2, 98, (32, 12), generator=torch.Generator().manual_seed(0))
sums = {}
for how in ("plainly", "jointly"):
    model = AutoModelForCausalLM.from_pretrained("model").train()
    with nullcontext() if how == "plainly" else model.joint_training(balance_loss_coef=0.01):
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        wrapped, optimizer, batches = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(inputs, 4))
        for batch in batches:
            accelerator.backward(wrapped(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        wrapped.eval()(input_ids=inputs[:4], labels=inputs[:4])
    state = model.base.state_dict()
    sums[how] = accelerator.gather(torch.tensor([[float(state[name].double().sum()) for name in NAMES]])).tolist()
    if accelerator.is_main_process:
        model.save_pretrained(how)
if accelerator.is_main_process:
    with open("sums.json", "w") as file:
        json.dump(sums, file)
"""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("memory", [20_000, 60_000])
def test_offloaded_parts_change_nothing(tied: bool, memory: int, tmp_path: Path) -> None:
    tiny_converted(tiny_dense(tied=tied)).save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offloaded"
    )
    places = set(map(str, offloaded.hf_device_map.values()))
    assert places == ({"disk"} if memory < 50_000 else {"cpu", "disk"})
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    for choices in ({}, {"lossless": True}, {"num_beams": 2}):
        assert offloaded.generate(PROMPT, **choices, **CHOICES).equal(plain.generate(PROMPT, **choices, **CHOICES))
    with torch.no_grad():
        for mode in ("sparse", "dense"):
            plain.head_mode = offloaded.head_mode = mode
            assert offloaded(PROMPT).logits.equal(plain(PROMPT).logits)


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    model = pack_router_of(tiny_converted())
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "train.py").write_text(TRAIN, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH.split(), "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sums, before = json.loads((tmp_path / "sums.json").read_text()), model.state_dict()
    for how in ("plainly", "jointly"):
        first, second = sums[how]
        assert first == second
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / how, output_loading_info=True)
        assert not any(info.values())
        after = loaded.state_dict()
        assert not after["base.lm_head.weight"].equal(before["base.lm_head.weight"])
        assert after.keys() == before.keys()
        is_unchanged = after["base.lm_head.router.bias"].equal(before["base.lm_head.router.bias"])
        assert is_unchanged == (how == "plainly")
