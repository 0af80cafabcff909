import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

PROJECT = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("requirement", PROJECT["dependency-groups"]["tools"])
def test_packages_of_the_tools_group_are_installed(requirement: str) -> None:
    assert version(re.match(r"[\w.-]+", requirement).group())
