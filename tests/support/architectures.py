"""The results in docs/architectures.md, and the check that they still hold."""

import re
from pathlib import Path

import pytest
import transformers

from hf_topk import InputError
from studies.architectures import AUTO_CLASSES, NOT_BUILT, Kind, check_conversion, model_types
from studies.tiny_models import tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
IS_OF_THIS_VERSION = f"transformers {transformers.__version__}," in PAGE
SHARE_THAT_PASSES: dict[Kind, float] = {"text": 0.95, "images and text": 0.9}


def outcomes(kind: Kind) -> dict[str, str]:
    table = PAGE.split(f"## Models of {kind}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| (\S+) \| \w+ \| (passes|refused|fails|is not built)", table, re.MULTILINE))


def check_as_the_page_says(kind: Kind, model_type: str, folder: Path) -> None:
    """Convert a model type and compare with the page; skip types that are not built in this version."""
    outcome = outcomes(kind).get(model_type)
    try:
        dense = tiny_model(AUTO_CLASSES[kind], model_type)
    except NOT_BUILT as error:
        if outcome == "is not built" or not IS_OF_THIS_VERSION:
            pytest.skip(f"is not built: {error}")
        raise
    if outcome == "refused":
        with pytest.raises(InputError):
            check_conversion(dense, folder)
    else:
        check_conversion(dense, folder)


def check_the_table(kind: Kind) -> None:
    """Check that the table has every type, none fails, and nearly all that are built pass."""
    found = outcomes(kind)
    if IS_OF_THIS_VERSION:
        assert found.keys() == model_types(kind).keys()
    built = [outcome for outcome in found.values() if outcome != "is not built"]
    assert "fails" not in built
    assert built.count("passes") >= SHARE_THAT_PASSES[kind] * len(built)
