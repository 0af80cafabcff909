from importlib.metadata import version

import pytest


@pytest.mark.parametrize(
    "tool", ["accelerate", "bitsandbytes", "hnswlib", "lm_eval", "openai", "peft", "torchao", "trl", "xgrammar"]
)
def test_what_the_extra_names_is_there(tool):
    assert version(tool)
