"""An interrupted conversion resumes where it stopped, and gives the result of an uninterrupted one."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import check_refused, contents, run_main
from support.tiny_models import QUICK, tiny_checkpoint, tiny_dense, tiny_text
from transformers import LlamaForCausalLM

from hf_topk.convert import Recipe, convert_checkpoint, pipeline
from hf_topk.windows import batches_of

ARGUMENTS = ("convert", "model", "out", "--recipe", "recipe.yaml")
WINDOWS_AT_ONCE = 2

Uninterrupted = tuple[dict[str, bytes | None], int]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_of, "__defaults__", (32 * WINDOWS_AT_ONCE,))


@pytest.fixture(params=["text.jsonl", pytest.param("mixed", marks=pytest.mark.slow)])
def here(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a dense model, a calibration text and a recipe that names it."""
    tiny_checkpoint(tmp_path / "model", tiny_dense(tied=False), chats=True)
    tiny_text(tmp_path / "text.jsonl")
    write_recipe(tmp_path, text=request.param)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder: Path, **choices: Any) -> None:
    (folder / "recipe.yaml").write_text(Recipe.from_dict({**QUICK, "positions": 400, **choices}).to_yaml())


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return functools.partial(check_refused, monkeypatch, capsys)


class Passes:
    """Counts the passes that record hidden states of the dense model, and interrupts one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interrupt_at: int | None = None) -> None:
        self.count = 0
        honest = LlamaForCausalLM.forward

        @functools.wraps(honest)
        def forward(model: LlamaForCausalLM, *arguments: Any, **choices: Any) -> Any:
            if model.lm_head._forward_pre_hooks:
                self.count += 1
                if self.count == interrupt_at:
                    raise KeyboardInterrupt
            return honest(model, *arguments, **choices)

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    return run_main(monkeypatch, *ARGUMENTS, *options)


def result(here: Path) -> dict[str, bytes | None]:
    """The written files, without the wall time."""
    files = contents(here / "out")
    metrics = json.loads(files.pop("figures.json"))
    assert metrics.pop("seconds") >= 0
    return {**files, "metrics": json.dumps(metrics).encode()}


@pytest.fixture
def uninterrupted(here: Path, monkeypatch: pytest.MonkeyPatch) -> Uninterrupted:
    """The result of an uninterrupted conversion and its number of passes; the folder is as before."""
    with monkeypatch.context() as patched:
        passes = Passes(patched)
        assert run(patched) == 0
    expected = result(here)
    shutil.rmtree(here / "out")
    return expected, passes.count


# Going on


@pytest.mark.parametrize("interrupt_at", [2, 4, 6])
def test_resumes_with_the_stored_hidden_states(
    interrupt_at: int, here: Path, uninterrupted: Uninterrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, all_passes = uninterrupted
    assert all_passes >= 6
    before = contents(here)
    with monkeypatch.context() as patched:
        Passes(patched, interrupt_at)
        assert run(patched) == 130
    assert {name for name in contents(here) if not name.startswith(".out.work")} == set(before)
    with monkeypatch.context() as patched:
        rest = Passes(patched)
        assert run(patched, "--resume") == 0
    assert rest.count == all_passes - (interrupt_at - 2)  # the first is a check that each run makes
    assert result(here) == expected
    assert not (here / ".out.work").exists()


@pytest.mark.parametrize("here", ["text.jsonl"], indirect=True)
def test_resumes_after_an_interruption_in_a_later_step(
    here: Path, uninterrupted: Uninterrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "train_router", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(patched) == 130
    with monkeypatch.context() as patched:
        passes = Passes(patched)
        assert run(patched, "--resume") == 0
    assert passes.count == 1 + 2  # a check that each run makes, and the batches that the plot is measured on
    assert result(here) == uninterrupted[0]


@pytest.mark.parametrize("here", ["text.jsonl"], indirect=True)
def test_resume_without_an_interrupted_conversion_starts_over(
    here: Path, uninterrupted: Uninterrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "--resume") == 0
    assert result(here) == uninterrupted[0]


@pytest.fixture
def interrupted(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A current folder with a conversion that was interrupted after two batches."""
    with monkeypatch.context() as patched:
        Passes(patched, interrupt_at=4)
        assert run(patched) == 130
    assert capsys.readouterr().err.splitlines()[-1] == ("hf-topk: interrupted; continue a conversion with --resume")
    return here


DAMAGE = {
    "cut in the middle": lambda states: states.write_bytes(states.read_bytes()[:-100]),
    "empty": lambda states: states.write_bytes(b""),
    "gone": lambda states: states.unlink(),
}


@pytest.mark.parametrize("here", ["text.jsonl"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGE)
def test_incomplete_states_are_computed_again(
    damage: str, here: Path, uninterrupted: Uninterrupted, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, all_passes = uninterrupted
    DAMAGE[damage](interrupted / ".out.work" / "hidden_states.bin")
    passes = Passes(monkeypatch)
    assert run(monkeypatch, "--resume") == 0
    assert passes.count == all_passes
    assert result(here) == expected


@pytest.mark.parametrize("here", ["text.jsonl"], indirect=True)
def test_bytes_beyond_the_record_are_overwritten(
    here: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (interrupted / ".out.work" / "hidden_states.bin").open("ab") as file:
        file.write(b"\xff" * 1000)  # of a batch that was not recorded
    assert run(monkeypatch, "--resume") == 0
    resumed = result(here)
    shutil.rmtree(here / "out")
    assert run(monkeypatch) == 0
    assert result(here) == resumed


# Refusing


@pytest.mark.parametrize("here", ["text.jsonl"], indirect=True)
def test_refuses_to_discard_an_interrupted_conversion(interrupted: Path, refused: Any) -> None:
    refused(*ARGUMENTS, parts=("a conversion to out was interrupted", "--resume", "--overwrite"))


def change_the_model(folder: Path) -> None:
    dense = tiny_dense(tied=False)
    with torch.no_grad():
        dense.lm_head.weight[7, 7] += 1
    dense.save_pretrained(folder / "model")


def change_the_config(folder: Path) -> None:
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


def change_the_tokenizer(folder: Path) -> None:
    tokenizer = (folder / "model" / "tokenizer.json").read_text()
    swapped = tokenizer.replace('"w1"', '"other"').replace('"w2"', '"w1"').replace('"other"', '"w2"')
    assert swapped != tokenizer
    (folder / "model" / "tokenizer.json").write_text(swapped)


CHANGES = {
    "model": change_the_model,
    "config": change_the_config,
    "tokenizer": change_the_tokenizer,
    "end of text": lambda folder: (folder / "model" / "generation_config.json").write_text('{"eos_token_id": 5}'),
    "text": lambda folder: tiny_text(folder / "text.jsonl", documents=5),
    "seed": lambda folder: write_recipe(folder, text="text.jsonl", seed=1),
    "tail_rank": lambda folder: write_recipe(folder, text="text.jsonl", tail_rank=7),
    "batch_size, learning_rate": lambda folder: write_recipe(
        folder, text="text.jsonl", batch_size=8, learning_rate=0.5
    ),
}
NAMED = {"config": "model", "end of text": "model", "tokenizer": "model"}


@pytest.mark.parametrize("here", ["text.jsonl"], indirect=True)
@pytest.mark.parametrize("change", CHANGES)
def test_refuses_to_resume_with_changed_inputs(
    change: str, interrupted: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    CHANGES[change](interrupted)
    name = NAMED.get(change, change)
    refused(*ARGUMENTS, "--resume", parts=("cannot resume", f"have changed: {name};", "--overwrite"))
    assert run(monkeypatch, "--overwrite") == 0
    assert not (interrupted / ".out.work").exists()


@pytest.mark.parametrize("here", ["text.jsonl"], indirect=True)
def test_a_refused_input_leaves_an_interrupted_conversion(interrupted: Path, refused: Any) -> None:
    (interrupted / "model" / "config.json").rename(interrupted / "model" / "config.old")
    refused(*ARGUMENTS, "--overwrite", parts=("no config.json",))
    (interrupted / "model" / "config.old").rename(interrupted / "model" / "config.json")
    refused(*ARGUMENTS, "--overwrite", "-k", 99, parts=("num_experts_per_tok is 99",))


@pytest.mark.parametrize("here", ["text.jsonl"], indirect=True)
def test_refuses_a_text_of_another_name(interrupted: Path, refused: Any) -> None:
    """Card and recipe of a resumed conversion must name the file that was read."""
    (interrupted / "text.jsonl").rename(interrupted / "moved.jsonl")
    write_recipe(interrupted, text="moved.jsonl")
    refused(*ARGUMENTS, "--resume", parts=("have changed: text;",))


def test_two_conversions_beside_each_other(here: Path) -> None:
    recipe = Recipe.from_yaml(here / "recipe.yaml")
    for out in ("a", "b"):
        convert_checkpoint("model", out, recipe)
    assert sorted(path.name for path in here.iterdir()) == ["a", "b", "model", "recipe.yaml", "text.jsonl"]
