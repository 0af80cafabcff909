"""Every image-text-to-text model of Transformers, as `test_every_architecture.py` for causal language models."""

from pathlib import Path

import pytest
from support.architectures import check_as_the_page_says, check_the_table

from studies.architectures import model_types


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of Transformers' own models
@pytest.mark.parametrize("model_type", model_types("images and text"))
def test_converts(model_type: str, tmp_path: Path) -> None:
    check_as_the_page_says("images and text", model_type, tmp_path)


def test_the_table() -> None:
    check_the_table("images and text")
