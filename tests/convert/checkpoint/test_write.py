"""The folder of a converted model is written completely or not at all."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command_line import check_refused, contents, run_main
from support.tiny_models import QUICK, tiny_checkpoint, tiny_text
from transformers import AutoModelForCausalLM

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.convert.checkpoint import write as checkpoint
from hf_topk.model.errors import TopKExpertsError

OPTIONS = ("--text", "text.jsonl", "--recipe", "recipe.yaml")
FILES = {"model", "recipe.yaml", "text.jsonl"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a dense model and a text."""
    tiny_checkpoint(tmp_path / "model")
    tiny_text(tmp_path / "text.jsonl")
    (tmp_path / "recipe.yaml").write_text(Recipe.from_dict(QUICK).to_yaml())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(check_refused, monkeypatch, capsys, "convert", "model")


def convert_here(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    return run_main(monkeypatch, "convert", "model", "out", *OPTIONS, *options)


def no_space(*arguments: Any, **choices: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")


FAILURES = {
    "copying": (checkpoint, "_copy"),
    "a companion": (checkpoint.shutil, "copyfile"),
    "the additions": (checkpoint, "save"),
    "the card": (checkpoint, "write_card"),
    "the last step": (checkpoint, "_move"),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failed_write_leaves_nothing_and_can_be_resumed(
    where: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    with monkeypatch.context() as patched:
        patched.setattr(*FAILURES[where], no_space)
        assert convert_here(patched) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-topk: ")
    assert "No space left on device" in error
    assert "--resume" in error
    assert "Traceback" not in error
    after = contents(here)
    assert {name for name in after if not name.startswith(".out.work")} == set(before)
    assert ".out.work/hidden_states.bin" in after
    assert convert_here(monkeypatch, "--resume") == 0
    assert capsys.readouterr().err.count("Running the dense model") == 1  # on what is held out alone
    assert {name.partition("/")[0] for name in contents(here)} == {*FILES, "out"}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failed_overwrite_leaves_the_old_model(where: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert_here(monkeypatch) == 0
    old = contents(here / "out")
    with monkeypatch.context() as patched:
        patched.setattr(*FAILURES[where], no_space)
        assert convert_here(patched, "--overwrite", "--seed", 1) == 1
    assert contents(here / "out") == old
    assert convert_here(monkeypatch, "--overwrite", "--resume", "--seed", 1) == 0
    assert contents(here / "out") != old
    assert {name.partition("/")[0] for name in contents(here)} == {*FILES, "out"}


def test_a_model_that_reloads_differently_is_deleted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checkpoint.additions_of
    monkeypatch.setattr(
        checkpoint,
        "additions_of",
        lambda model: {
            name: tensor.flip(0) if name.endswith("expert_ids") else tensor for name, tensor in honest(model).items()
        },
    )
    with pytest.raises(TopKExpertsError, match="gives different sparse logits"):
        convert_checkpoint("model", "out", Recipe.from_dict({**QUICK, "text": "text.jsonl"}))
    assert not (here / "out").exists()
    assert not (here / ".out.partial").exists()


def test_overwriting_removes_the_old_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert_here(monkeypatch) == 0
    (here / "out" / "stale.txt").write_text("old")
    assert convert_here(monkeypatch, "--overwrite") == 0
    assert not (here / "out" / "stale.txt").exists()


@pytest.mark.parametrize("out", [".", "./", "../out/"])
def test_overwriting_keeps_the_folder_that_a_shell_is_in(out: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert convert_here(monkeypatch) == 0
    before = sorted(path.name for path in here.iterdir())
    (here / "out" / "stale.txt").write_text("old")
    monkeypatch.chdir(here / "out")
    options = ("--text", "../text.jsonl", "--recipe", "../recipe.yaml", "--seed", 1, "--overwrite")
    assert run_main(monkeypatch, "convert", "../model", out, *options) == 0
    assert Path.cwd() == here / "out"
    assert Path().stat().st_ino == (here / "out").stat().st_ino
    assert Recipe.from_yaml(Path("recipe.yaml")).seed == 1
    assert not Path("stale.txt").exists()
    assert sorted(path.name for path in here.iterdir()) == before
    assert isinstance(AutoModelForCausalLM.from_pretrained("."), TopKExpertsForCausalLM)


def test_an_old_folder_that_cannot_be_removed_is_left(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems do not remove files that another process has open."""
    remove = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False, **options: Any) -> None:
        if Path(path).name != ".out.replaced" or not Path(path).exists():
            remove(path, ignore_errors=ignore_errors, **options)
        elif not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    assert convert_here(monkeypatch) == 0
    monkeypatch.setattr(shutil, "rmtree", busy)
    assert convert_here(monkeypatch, "--overwrite", "--seed", 1) == 0
    assert Recipe.from_yaml(here / "out" / "recipe.yaml").seed == 1


# Where it cannot be written


def test_refuses_an_existing_output(here: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "out").mkdir()
    refused("out", parts=("out exists", "choose another output folder", "--overwrite"))
    refused(".", parts=("exists", "--overwrite"))
    refused("model", "--overwrite", parts=("model is the model's own", "choose another"))
    (here / "out" / "thesis.txt").write_text("precious")
    refused("out", "--overwrite", parts=("out is not a converted model", "choose another"))
    refused("text.jsonl", "--overwrite", parts=("text.jsonl is not a folder", "choose another"))
    refused(".", "--overwrite", parts=("is not a converted model", "choose another"))
    (here / "link").symlink_to("out")
    refused("link", "--overwrite", parts=("link is not a folder", "choose another"))
    shutil.copytree(here / "model", here / "other")
    refused("other", "--overwrite", parts=("other is not a converted model", "choose another"))


def test_refuses_a_place_below_a_file(here: Path, refused: Any) -> None:
    refused("text.jsonl/out", parts=("cannot write to", "text.jsonl", "choose an output folder elsewhere"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_refuses_a_parent_that_is_not_writable(here: Path, refused: Any) -> None:
    (here / "locked").mkdir(mode=0o500)
    refused("locked/out", parts=("cannot write to", "locked", "change its permissions"))


def test_refuses_a_full_disk(here: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**30, used=2**30, free=2**10))
    parts = ("0 MiB left", "needs about", "make room")
    refused("out", *OPTIONS, parts=parts)
    refused("new/deep/out", *OPTIONS, parts=parts)


@pytest.fixture
def small_disk(here: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = here / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_reported_before_or_while_writing(
    small_disk: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused("disk/out", *OPTIONS, parts=("MiB left", "make room"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, used=0, free=2**40))
    assert run_main(monkeypatch, "convert", "model", "disk/out", *OPTIONS) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-topk: cannot write")
    assert "No space left on device" in error
    assert not (small_disk / "out").exists()
    assert not (small_disk / ".out.partial").exists()
