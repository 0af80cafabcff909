"""Ignores warnings of the tools; this package's own stay errors."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
NOT_OURS = "ignore:::(?!hf_topk)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(NOT_OURS))
