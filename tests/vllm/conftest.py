"""Folders of tiny models, and vLLM started on them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import character_tokenizer
from support.vllm_engine import LONGER, OPTIONS, end, save_converted, small_dense, tokens_of
from vllm import LLM

HERE = Path(__file__).parent
# Warnings that vLLM and what it needs raise are theirs; this package's own stay errors.
NOT_OURS = "ignore:::(?!hf_topk)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(NOT_OURS))
    # Prompt lookup loads numba, and vLLM 0.32 does not start again in a process that has it.
    items.sort(key=lambda item: item.path == HERE / "test_lossless.py")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_converted(tmp_path_factory.mktemp("converted") / "out")


@pytest.fixture(scope="session")
def dense_tokens(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """30 new tokens of vLLM's own dense model for each prompt."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    small_dense().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    llm = LLM(str(folder), **OPTIONS)
    tokens = tokens_of(llm, LONGER)
    end(llm)
    return tokens


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Starts vLLM on a folder, with options of `vllm.LLM`; ends it after the test."""
    started: list[Any] = []

    def start_one(folder: Path, **options: Any) -> Any:
        while started:
            end(started.pop())
        started.append(LLM(str(folder), **{**OPTIONS, **options}))
        return started[0]

    yield start_one
    while started:
        end(started.pop())
