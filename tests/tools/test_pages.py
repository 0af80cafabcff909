"""The Python code of the pages on other tools and on training runs as it is printed."""

from pathlib import Path

import pytest
from datasets import Dataset
from support.pages import run_python_of
from support.tiny_models import (
    character_tokenizer,
    pack_router_of,
    some_windows,
    tiny_converted,
    tiny_dense,
    tiny_tokenizer,
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_tools() -> None:
    model, tokenizer = tiny_converted(tiny_dense(tied=False)), character_tokenizer()
    model.save_pretrained("OUT")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    schema = '{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}'
    names = {"model": model, "tokenizer": tokenizer, "inputs": inputs, "ids": inputs["input_ids"], "schema": schema}
    _, skipped = run_python_of("docs/tools.md", apart=True, **names)
    assert len(skipped) == 2, skipped
    assert Path("OUT-int8").is_dir()


def test_training() -> None:
    pack_router_of(tiny_converted()).save_pretrained("out")
    texts = [list(window.token_ids[:16]) for window in some_windows()]
    rows = Dataset.from_list([{"input_ids": text, "labels": text} for text in texts])
    _, skipped = run_python_of("docs/training.md", train=rows, test=rows, tokenizer=tiny_tokenizer())
    assert skipped == []
    assert {"trained", "dense", "adapter", "merged"} <= {folder.name for folder in Path().iterdir()}
