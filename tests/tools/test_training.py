"""Trainer and TRL's SFTTrainer: the bundled model and its router are trained on another kind of text."""

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
from support.tiny_models import pack_router_of, tiny_converted
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint, demo
from hf_topk.evaluation.fidelity import Fidelity, measure_fidelity
from hf_topk.windows import Window, make_windows

PROSE = Path(demo.__file__).parent / "kwaidan.txt"
# Everyone has the sources of Python's own library, and the bundled model was trained on prose.
TO_TRAIN_ON, HELD_OUT = (argparse, ast, typing, zipfile), (inspect, textwrap)
WINDOW_LENGTH = 128
CHOICES: dict[str, Any] = {
    "max_steps": 16,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def windows_of(modules: tuple[Any, ...], tokenizer: Any, positions: int | None = None) -> list[Window]:
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in modules]
    windows = make_windows(sources, tokenizer, WINDOW_LENGTH, positions, seed=0)
    return [window for window in windows if len(window.token_ids) == WINDOW_LENGTH]


def rows_of(windows: list[Window]) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(window.token_ids), "labels": list(window.token_ids)} for window in windows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, converted with few steps."""
    out = tmp_path_factory.mktemp("books") / "out"
    recipe = Recipe(text=str(PROSE), positions=8_000, distill_steps=200, num_experts_per_tok=8, sparse_max_positions=16)
    convert_checkpoint(None, out, recipe)
    return out


class Run:
    """A model, trained on Python sources and measured on others."""

    def __init__(self, folder: Path) -> None:
        self.model: TopKExpertsForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.held_out = windows_of(HELD_OUT, self.tokenizer, 2_000)

    def measure(self, what: str) -> Fidelity:
        found = measure_fidelity(self.model.eval(), self.held_out)
        print(
            f"\n{what}: agreement {found.agreement:.2%}, KL {found.kl:.3f}, "
            f"perplexity {found.perplexity_dense:.0f} dense, {found.perplexity_sparse:.0f} sparse"
        )
        return found

    def train(self, by: type[Trainer], jointly: bool, folder: Path) -> tuple[float, float]:
        """Train, and return the trainer's `eval_loss` before and after."""
        torch.manual_seed(0)
        data = [rows_of(windows_of(TO_TRAIN_ON, self.tokenizer)), rows_of(self.held_out)]
        if by is SFTTrainer:
            config = SFTConfig(str(folder), max_length=WINDOW_LENGTH, **CHOICES)
            sets = [Dataset.from_list(rows) for rows in data]
            trainer = SFTTrainer(self.model, config, None, *sets, processing_class=self.tokenizer)
        else:
            trainer = Trainer(self.model, TrainingArguments(str(folder), **CHOICES), None, *data)
        before = trainer.evaluate()["eval_loss"]
        with self.model.joint_training() if jointly else nullcontext():
            trainer.train()
        return before, trainer.evaluate()["eval_loss"]


@pytest.fixture(scope="module")
def before(folder: Path) -> Fidelity:
    return Run(folder).measure("before")


@pytest.fixture(scope="module")
def without(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Fidelity:
    """The model trained without joint training."""
    run = Run(folder)
    first, last = run.train(Trainer, False, tmp_path_factory.mktemp("run"))
    assert last < first - 1
    return run.measure("Trainer, without joint training")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by TRL itself
@pytest.mark.parametrize("by", [Trainer, SFTTrainer])
def test_router_follows_the_model(
    by: type[Trainer], folder: Path, before: Fidelity, without: Fidelity, tmp_path: Path
) -> None:
    run = Run(folder)
    first, last = run.train(by, True, tmp_path)
    assert last < first - 1
    run.model.save_pretrained(tmp_path / "trained")
    run.model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert run.model.config.router_packed
    found = run.measure(f"{by.__name__}, joint training")
    assert found.perplexity_dense < 0.5 * before.perplexity_dense
    assert found.agreement > before.agreement - 0.01
    assert found.agreement > without.agreement + 0.05
    assert found.kl < 0.7 * without.kl  # the tail is as it was


def test_resumes_where_it_was(tmp_path: Path) -> None:
    """A trainer loads inside the context what it saved there."""
    ids = torch.randint(2, 98, (32, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def train(**given: Any) -> dict[str, Tensor]:
        model = pack_router_of(tiny_converted())
        choices = {**CHOICES, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        with model.joint_training():
            Trainer(model, TrainingArguments(str(tmp_path), **choices), train_dataset=rows).train(**given)
        return model.state_dict()

    whole, resumed = train(), train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    bias = "base.lm_head.router.bias"  # packing sets it by the mean state, which is of the passes since it resumed
    assert all(tensor.equal(whole[name]) for name, tensor in resumed.items() if name != bias)
    torch.testing.assert_close(resumed[bias], whole[bias], rtol=0, atol=0.5)
    assert not whole["base.lm_head.router.bias"].equal(pack_router_of(tiny_converted()).head.router.bias)


def test_combiner_and_balance_are_trained_too(tmp_path: Path) -> None:
    ids = torch.randint(2, 98, (32, 12), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def train(balance_loss_coef: float) -> dict[str, Tensor]:
        model = tiny_converted(combine="learned")
        with model.joint_training(balance_loss_coef=balance_loss_coef):
            Trainer(model, TrainingArguments(str(tmp_path), **{**CHOICES, "max_steps": 4}), train_dataset=rows).train()
        return model.state_dict()

    before, after, other = tiny_converted(combine="learned").state_dict(), train(0.01), train(0.0)
    combiner = [name for name in before if ".combiner." in name]
    assert combiner
    assert not any(after[name].equal(before[name]) for name in combiner)
    assert not after["base.lm_head.router.bias"].equal(other["base.lm_head.router.bias"])
    for name in ("base.lm_head.weight", *combiner):  # the balance term trains the router alone
        torch.testing.assert_close(after[name], other[name], rtol=1e-3, atol=1e-4)
