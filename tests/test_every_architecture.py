"""Every causal language model that Transformers has, tiny and random, converted on disk and checked."""

import re
from pathlib import Path

import pytest
import transformers
from transformers import AutoModelForCausalLM

from hf_topk import InputError
from hf_topk.convert.architectures import NOT_BUILT, check_conversion, model_types
from hf_topk.convert.tiny_models import tiny_model

PAGE = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text(encoding="utf-8")
TABLE = PAGE.split("## Models of text")[1].split("## ")[0]
OUTCOMES = dict(re.findall(r"^\| (\S+) \| \w+ \| (passes|refused|fails|is not built)", TABLE, re.MULTILINE))
SHARE_THAT_PASSES = 0.95


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of Transformers' own models
@pytest.mark.parametrize("model_type", model_types("text"))
def test_converts(model_type: str, tmp_path: Path) -> None:
    try:
        dense = tiny_model(AutoModelForCausalLM, model_type)
    except NOT_BUILT as error:
        pytest.skip(f"is not built: {error}")
    if OUTCOMES.get(model_type) == "refused":
        with pytest.raises(InputError):
            check_conversion(dense, tmp_path)
    else:
        check_conversion(dense, tmp_path)


def test_the_table_has_them_all() -> None:
    if f"transformers {transformers.__version__}," not in PAGE:
        pytest.skip("the table was made with another version of Transformers")
    assert OUTCOMES.keys() == model_types("text").keys()


def test_nearly_all_pass() -> None:
    built = [outcome for outcome in OUTCOMES.values() if outcome != "is not built"]
    assert built.count("passes") >= SHARE_THAT_PASSES * len(built)
    assert "fails" not in built
