"""Every causal language model that Transformers has, tiny and random, converted on disk and checked."""

from pathlib import Path

import pytest
from architecture_helpers import check_as_the_page_says, check_the_table

from hf_topk.convert.architectures import model_types


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of Transformers' own models
@pytest.mark.parametrize("model_type", model_types("text"))
def test_converts(model_type: str, tmp_path: Path) -> None:
    check_as_the_page_says("text", model_type, tmp_path)


def test_the_table() -> None:
    check_the_table("text")
