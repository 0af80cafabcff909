"""Conversion by several processes of `accelerate launch` or `torchrun` equals that of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.command_line import PROGRESS_LINE, check_refused, contents, own_lines
from support.tiny_models import QUICK, tiny_checkpoint, tiny_dense, tiny_text

from hf_topk.convert import Recipe, convert_checkpoint, processes
from hf_topk.convert.steps import hidden_states
from hf_topk.model.errors import InputError

pytestmark = pytest.mark.slow

ACCELERATE = (
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 "
    "--mixed_precision no --dynamo_backend no"
)
TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2"
# The command line, but that something happens when the second process begins a pass of the dense model.
TROUBLE = """
import os
from hf_topk.cli import main
from hf_topk.convert.steps import hidden_states
from hf_topk.model.errors import InputError

def inputs_of(*arguments):
    if os.environ["RANK"] == "1":
        {trouble}
    return honest(*arguments)

honest, hidden_states.inputs_of = hidden_states.inputs_of, inputs_of
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a recipe of five batches, and `text`, converted with it by one process."""
    folder = tmp_path_factory.mktemp("folder")
    tiny_checkpoint(folder / "model", tiny_dense(tied=False), chats=True)
    text = tiny_text(folder / "text.jsonl", documents=100)
    recipe = Recipe.from_dict({**QUICK, "text": str(text), "positions": 20_000})
    (folder / "text.yaml").write_text(recipe.to_yaml())
    convert_checkpoint(str(folder / "model"), folder / "text", recipe)
    return folder


def convert_here(folder: Path, out: str, recipe: str, **choices: Any) -> None:
    convert_checkpoint(str(folder / "model"), folder / out, Recipe.from_yaml(folder / f"{recipe}.yaml"), **choices)


def launch(folder: Path, launcher: str, out: str, recipe: str, *options: str) -> Any:
    environment = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(folder / "no-cache"),
    }
    command = [sys.executable, "-m", *launcher.split()]
    arguments = ["convert", str(folder / "model"), out, "--recipe", f"{recipe}.yaml", *options]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def in_trouble(folder: Path, trouble: str) -> str:
    (folder / "trouble.py").write_text(TROUBLE.format(trouble=trouble))
    return f"{TORCHRUN} trouble.py"


def result(folder: Path) -> dict[str, bytes | None]:
    """The written files, without the wall time."""
    files = contents(folder)
    metrics = json.loads(files.pop("figures.json"))
    assert metrics.pop("seconds") >= 0
    return {**files, "metrics": json.dumps(metrics).encode()}


def test_two_processes_resume_to_the_result_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, batches = hidden_states.inputs_of, iter(range(2))

    def inputs_of(*arguments: Any) -> Any:
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return honest(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(hidden_states, "inputs_of", inputs_of)
        with pytest.raises(KeyboardInterrupt):
            convert_here(folder, "out", "text")
    assert json.loads((folder / ".out.work" / "hidden_states.json").read_text())["positions"] > 0
    done = launch(folder, f"{ACCELERATE} -m hf_topk.cli", "out", "text", "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert result(folder / "out") == result(folder / "text")
    assert not (folder / ".out.work").exists()
    metrics = json.loads(done.stdout)
    assert metrics["agreement"] == json.loads((folder / "text" / "figures.json").read_text())["agreement"]
    lines = own_lines(done.stderr)
    assert all(PROGRESS_LINE.fullmatch(line) for line in lines), done.stderr
    for step, times in (("Reading the checkpoint", 1), ("Running the dense model", 2)):  # then on what is held out
        assert sum(line.startswith(step) for line in lines) == times, done.stderr


def test_two_processes_convert_as_one_does(folder: Path) -> None:
    done = launch(folder, f"{TORCHRUN} -m hf_topk.cli", "shared", "text")
    assert done.returncode == 0, done.stderr
    assert result(folder / "shared") == result(folder / "text")


def test_an_error_of_one_process_is_printed_once(folder: Path) -> None:
    launcher = in_trouble(folder, 'raise InputError("this batch is bad")')
    before = contents(folder)
    done = launch(folder, launcher, "new", "text")
    assert done.returncode != 0
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("hf-topk")] == ["hf-topk: this batch is bad"]
    assert "(exitcode: 2)" in done.stderr
    assert contents(folder) == before


def test_one_process_resumes_where_one_of_two_died(folder: Path) -> None:
    # In its second pass, so that something has been kept.
    launcher = in_trouble(folder, 'os._exit(9) if os.environ.pop("FIRST", "") else os.environ.update(FIRST="no")')
    done = launch(folder, launcher, "late", "text")
    assert done.returncode != 0
    assert done.stdout == ""
    kept = json.loads((folder / ".late.work" / "hidden_states.json").read_text())
    assert 0 < kept["positions"] < 18_000
    convert_here(folder, "late", "text", resume=True)
    assert result(folder / "late") == result(folder / "text")


# In this process


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make this process the main one of two; the calls that it sends to the other one."""
    told: list[Any] = []
    state = SimpleNamespace(num_processes=2, device=torch.device("cpu"), destroy_process_group=lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_connect", lambda: state)
    monkeypatch.setattr(processes, "_broadcast", told.append)
    return told


def test_refuses_a_device_map_for_several_processes(folder: Path, launched: list[Any]) -> None:
    with pytest.raises(InputError, match="launch a single process"):
        convert_here(folder, "mapped", "text", device_map="auto")
    assert launched == [None]


def test_only_the_first_process_converts(folder: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="run_worker"):
        convert_here(folder, "second", "text")
    assert launched == []


def test_several_processes_need_accelerate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        check_refused(monkeypatch, capsys, "convert", folder / "model", "out", parts=("hf-topk[accelerate]",))
