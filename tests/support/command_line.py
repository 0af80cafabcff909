"""Runs the command line in the process of a test."""

import re
import sys
from pathlib import Path

import pytest

from hf_topk.cli import main

PROGRESS_LINE = re.compile(r"[\w' ]+: [\d,]+ \w+ in [\d.]+ s")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["hf-topk", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def own_lines(stderr: str) -> list[str]:
    """The lines of a command's stderr, without those of torchao, which `make test-tools` installs."""
    return [line for line in stderr.splitlines() if "torchao" not in line and "_pytree.py" not in line]


def contents(folder: Path) -> dict[str, bytes | None]:
    """The contents of a folder, recursive and with hidden files: the bytes of each file, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def check_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object, parts: tuple[str, ...]
) -> None:
    """Check that a command is refused in one line with these parts, and that the current folder is unchanged."""
    before = contents(Path())
    capsys.readouterr()
    code = run_main(monkeypatch, *arguments)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert contents(Path()) == before
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if not PROGRESS_LINE.fullmatch(line)]
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("hf-topk: ")
    for part in parts:
        assert part in lines[0]
