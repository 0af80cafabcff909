"""The messages in docs/troubleshooting.md are those that the code has."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# A cell with a message is nothing but code; those of other libraries say whose they are.
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)
DIFFERS = "\0"


@cache
def strings_of_the_code() -> list[str]:
    """All strings of the package, with NUL for what is put into them."""
    files = [file for folder in ("hf_topk", "convert") for file in (ROOT / folder).rglob("*.py")]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(one.value if isinstance(one, ast.Constant) else DIFFERS for one in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [" ".join(one.split()).replace("`", "") for one in found]


def is_in_the_code(message: str) -> bool:
    """Whether a string has all of the message in its order; `...` stands for anything, and so does what is put in."""
    parts = [re.escape(part) for part in message.split("...")]
    pattern = re.compile(".*".join(parts), flags=re.DOTALL)
    return any(pattern.search(one) for one in strings_of_the_code())


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message: str) -> None:
    assert is_in_the_code(message)


def test_other_messages_are_missed() -> None:
    assert len(MESSAGES) > 30
    assert not is_in_the_code("... is quantised: give another checkpoint")
