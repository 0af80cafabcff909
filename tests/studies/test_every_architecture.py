"""Every causal language model that Transformers has, tiny and random, converted on disk and checked."""

from pathlib import Path

import pytest
from support import architectures
from support.architectures import check_as_the_page_says, check_the_table

from studies.architectures import model_types


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of Transformers' own models
@pytest.mark.parametrize("model_type", model_types("text"))
def test_converts(model_type: str, tmp_path: Path) -> None:
    check_as_the_page_says("text", model_type, tmp_path)


def test_the_table() -> None:
    check_the_table("text")


def test_a_type_that_is_no_longer_built_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such model")

    monkeypatch.setattr(architectures, "tiny_model", fail)
    monkeypatch.setattr(architectures, "IS_OF_THIS_VERSION", True)
    with pytest.raises(ValueError, match="no such model"):
        check_as_the_page_says("text", "llama", tmp_path)
    with pytest.raises(pytest.skip.Exception):
        check_as_the_page_says("text", "musicgen", tmp_path)
