"""Examples run as they are printed: those of docstrings, and the Python code of the README.

They run in a folder with the files that they name: a dense model, converted models and text.
"""

import doctest
import importlib
import pkgutil
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.tiny_models import tiny_checkpoint, tiny_converted, tiny_text, tiny_tokenizer

import hf_topk

README = Path(__file__).parents[2] / "README.md"
DENSE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def modules_with_examples() -> list[str]:
    modules = [module.name for module in pkgutil.walk_packages(hf_topk.__path__, "hf_topk.")]
    return [name for name in modules if ">>> " in Path(find_spec(name).origin).read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    tiny_checkpoint(folder / "dense")
    tiny_converted().save_pretrained(folder / "out")
    tiny_tokenizer().save_pretrained(folder / "out")
    shutil.copytree(folder / "out", folder / "smollm2-topk")
    (folder / "books").mkdir()
    tiny_text(folder / "books" / "books.jsonl")
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", modules_with_examples())
@pytest.mark.usefixtures("here")
def test_examples_of_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0  # what differed is printed


def test_python_of_the_readme_runs(here: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL))
    assert DENSE_MODEL in code
    names: dict[str, object] = {}
    exec(code.replace(DENSE_MODEL, "dense"), names)  # in one namespace, as a reader would run them
    assert names["dense"].config.model_type == "llama"
    assert names["report"].model.config.model_type == "topk_experts"
