"""Examples run as they are printed: those of docstrings, and the Python code of all pages.

They run in a folder with the files that they name: a dense model, converted models and text.
"""

import doctest
import importlib
import pkgutil
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.pages import FENCE, ROOT, code_of, run_python_of
from support.seq2seq_models import tiny_model, tiny_speech, tiny_whisper_checkpoint
from support.tiny_models import tiny_checkpoint, tiny_converted, tiny_text, tiny_tokenizer
from transformers import AutoModelForSpeechSeq2Seq

import hf_topk

DENSE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md"))]
# Pages that other tests run: with other tools, with a Hub.
ELSEWHERE = {"docs/hub.md", "docs/tools.md", "docs/training.md"}
HERE = [page for page in PAGES if page not in ELSEWHERE and FENCE in (ROOT / page).read_text(encoding="utf-8")]


def modules_with_examples() -> list[str]:
    modules = [module.name for module in pkgutil.walk_packages(hf_topk.__path__, "hf_topk.")]
    return [name for name in modules if ">>> " in Path(find_spec(name).origin).read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    tiny_checkpoint(folder / "dense")
    tiny_converted().save_pretrained(folder / "out")
    tiny_tokenizer().save_pretrained(folder / "out")
    for name in ("OUT", "smollm2-topk"):
        shutil.copytree(folder / "out", folder / name)
    shutil.copytree(folder / "dense", folder / DENSE_MODEL)
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


def translator(folder: Path) -> None:
    """A converted translation model `out` in place of the causal one."""
    dense, _ = tiny_model("marian")
    dense.generation_config.max_length = 12
    tiny_converted(dense).save_pretrained(folder / "out")


def listener(folder: Path) -> None:
    """A converted speech model `out` in place of the causal one, and a recording."""
    pytest.importorskip("soundfile")
    shutil.rmtree(folder / "out")
    tiny_whisper_checkpoint(folder / "out")
    model = tiny_converted(AutoModelForSpeechSeq2Seq.from_pretrained(folder / "out"))
    model.generation_config.max_new_tokens = 16
    model.save_pretrained(folder / "out")
    tiny_speech(folder / "speech", files=1)


PREPARED: dict[str, Callable[[Path], None]] = {"docs/translation.md": translator, "docs/speech.md": listener}


@pytest.mark.parametrize("page", HERE)
def test_python_of_a_page_runs(page: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PREPARED.get(page, lambda folder: None)(here)
    _, skipped = run_python_of(page)
    assert skipped == (["vLLM has an environment of its own: tests/vllm"] if page == "docs/vllm.md" else [])
    if page in PREPARED:  # a line without lossless, and one with it
        assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("page", PAGES)
def test_all_python_of_a_page_is_found(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(code_of(page)) == len(re.findall(r"^ *```(?:py|python)\b", text, flags=re.MULTILINE))
