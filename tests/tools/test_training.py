"""Trainer and TRL's SFTTrainer: the bundled model is trained on text of another kind, and its router follows it."""

import argparse
import ast
import inspect
import textwrap
import typing
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint, demo
from hf_topk.measure.fidelity import Fidelity, measure_fidelity
from hf_topk.text import make_windows

PROSE = Path(demo.__file__).parent / "kwaidan.txt"
# Everyone has the sources of Python's own library, and the bundled model has read none of them.
TO_TRAIN_ON, HELD_OUT = (argparse, ast, typing, zipfile), (inspect, textwrap)
WINDOW_LENGTH = 128
STEPS = 40
CHOICES: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_eval_batch_size": 4,
}


def sources(modules: tuple[Any, ...]) -> list[str]:
    return [Path(module.__file__).read_text(encoding="utf-8") for module in modules]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("books") / "out"
    recipe = Recipe(text=str(PROSE), positions=8_000, distill_steps=300, num_experts_per_tok=8, sparse_max_positions=16)
    convert_checkpoint(None, str(out), recipe)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


class Run:
    """One model, trained and measured."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.model: TopKExpertsForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._windows = make_windows(sources(HELD_OUT), tokenizer, WINDOW_LENGTH, 4_000, seed=0)
        self.held_out = rows_of(self._windows)

    def measure(self) -> Fidelity:
        return measure_fidelity(self.model.eval(), self._windows)


def rows_of(windows: list[Any]) -> list[dict[str, Any]]:
    whole = [list(window.token_ids) for window in windows if len(window.token_ids) == WINDOW_LENGTH]
    return [{"input_ids": ids, "labels": ids} for ids in whole]


def train(run: Run, tokenizer: Any, how: type[Trainer], jointly: bool, tmp_path: Path) -> dict[str, float]:
    """Train, and evaluate before and after: what the trainer says of it."""
    texts = sources(TO_TRAIN_ON)
    rows = rows_of(make_windows(texts, tokenizer, WINDOW_LENGTH, None, seed=1))
    torch.manual_seed(0)
    if how is SFTTrainer:
        config = SFTConfig(str(tmp_path), max_length=WINDOW_LENGTH, **CHOICES)
        data = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(run.held_out)}
        trainer = SFTTrainer(run.model, config, processing_class=tokenizer, **data)
    else:
        trainer = Trainer(
            run.model, TrainingArguments(str(tmp_path), **CHOICES), train_dataset=rows, eval_dataset=run.held_out
        )
    before = trainer.evaluate()["eval_loss"]
    with run.model.joint_training() if jointly else nullcontext():
        trainer.train()
    return {"before": before, "after": trainer.evaluate()["eval_loss"]}


@pytest.mark.parametrize("how", [Trainer, SFTTrainer])
def test_router_follows_the_model(how: type[Trainer], folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    found = {}
    for jointly in (False, True):
        run = Run(folder, tokenizer)
        before = run.measure()
        losses = train(run, tokenizer, how, jointly, tmp_path)
        found[jointly] = (losses, before, run.measure())
        print(how.__name__, jointly, losses, before, found[jointly][2], sep="\n")
