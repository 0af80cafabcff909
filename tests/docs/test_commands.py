"""Pages and workflows call existing targets of make, commands and options of hf-topk, and extras of the package."""

import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
import yaml

from hf_topk.cli import app

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob(".github/**/*.md"))]
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
COMMANDS = typer.main.get_command(app).commands
TARGETS = set(re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1].split())

of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def targets_in(text: str) -> set[str]:
    return set(re.findall(r"(?:`|^|\$ |&& )make ([\w-]+)", text, flags=re.MULTILINE))


def commands_in(text: str) -> list[list[str]]:
    """The calls of hf-topk in blocks and spans of code, as words."""
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    calls = re.findall(r"^(?:\$ )?(hf-topk [a-z].*)$", blocks, flags=re.MULTILINE)
    calls += re.findall(r"`(hf-topk [a-z][^`]*)`", text)
    return [shlex.split(call, comments=True) for call in calls]


def runs_of(workflow: Path) -> list[str]:
    """The commands of the steps, for each value of a matrix."""
    runs = []
    for job in yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values():
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [""])
        steps = [step["run"] for step in job["steps"] if "run" in step]
        runs += [run.replace("${{ matrix.target }}", target) for run in steps for target in targets]
    return runs


@of_each_page
def test_targets_of_make_exist(page: Path) -> None:
    assert targets_in(page.read_text(encoding="utf-8")) <= TARGETS


@of_each_page
def test_commands_and_options_of_hf_topk_exist(page: Path) -> None:
    for _, command, *words in commands_in(page.read_text(encoding="utf-8")):
        known = {"--help", *(option for parameter in COMMANDS[command].params for option in parameter.opts)}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known, words


@of_each_page
def test_extras_of_the_package_exist(page: Path) -> None:
    named = set(re.findall(r"hf-topk\[(\w+)\]", page.read_text(encoding="utf-8")))
    assert named <= PROJECT["project"]["optional-dependencies"].keys()


def test_the_readme_has_the_first_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"demo", "test"} <= targets_in(readme)
    assert {command for _, command, *_ in commands_in(readme)} == COMMANDS.keys()


def test_the_quick_start_names_all_extras() -> None:
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"hf-topk\[(\w+)\]", page)) == PROJECT["project"]["optional-dependencies"].keys()


@pytest.mark.skipif(f"typer=={version('typer')}" not in PINS, reason="another version of typer writes it otherwise")
def test_the_page_of_the_command_line_is_what_the_app_says() -> None:
    command = [sys.executable, "-m", "typer", "hf_topk.cli", "utils", "docs", "--name", "hf-topk"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written.strip() == page.strip(), "docs/cli.md is out of date: run `make docs`"


def test_workflows_run_targets_of_make() -> None:
    targets = {workflow.stem: set().union(*map(targets_in, runs_of(workflow))) for workflow in WORKFLOWS}
    assert targets["ci"] == {"lint", "docs", "test-all", "test-tools"}
    assert targets["release"] == {"lint", "test-all"}
    assert set().union(*targets.values()) <= TARGETS
