"""The applications run on the bundled model, each as a user starts it, and do what their page says of them."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
NAMES = sorted(file.stem for file in (DOCS / "examples").glob("*.py") if file.stem != "common")


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """Imports an example by its name, as when Python starts it."""
    sys.path.insert(0, str(DOCS / "examples"))
    yield importlib.import_module
    sys.path.remove(str(DOCS / "examples"))
    for name in (*NAMES, "common"):
        sys.modules.pop(name, None)


def check_heads(outputs: dict[str, Any], answers: int) -> None:
    """All heads have answered, and the lossless answers are the dense ones."""
    assert list(outputs) == ["dense", "sparse", "lossless"]
    assert {len(output.answers) for output in outputs.values()} == {answers}
    assert outputs["lossless"].answers == outputs["dense"].answers
    assert outputs["lossless"].dense_passes < outputs["dense"].dense_passes == outputs["dense"].tokens
    assert outputs["sparse"].dense_passes == 0


def test_all_applications_are_on_their_page() -> None:
    page = (DOCS / "applications.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\(examples/(\w+)\.py\)", page)) == {*NAMES, "common"}
    assert set(re.findall(r"python docs/examples/(\w+)\.py", page)) == set(NAMES)


def test_an_application_starts_as_its_page_says(bundled: Path) -> None:
    command = [sys.executable, DOCS / "examples" / "ranking.py", bundled]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^dense +1\.000", done.stdout, flags=re.MULTILINE)


def test_the_bundled_model_is_converted_if_none_is_given(
    example: Any, tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: ModuleType = example("common")
    asked = []

    def convert(model: str | None, out: Path, recipe: Any) -> None:
        asked.append((model, out))
        out.symlink_to(bundled)

    monkeypatch.setattr(common, "BUNDLED", tmp_path / "books-topk")
    monkeypatch.setattr(common, "convert_checkpoint", convert)
    for _ in range(2):
        model, _ = common.load(None)
    assert asked == [(None, tmp_path / "books-topk")]
    assert model.config.model_type == "topk_experts"


def test_text_generation(example: Any, bundled: Path) -> None:
    results = example("text_generation").main(str(bundled), new_tokens=24)
    for outputs in results.values():
        check_heads(outputs, answers=8)
    greedy = results["greedy"]
    assert greedy["sparse"].same_tokens(greedy["dense"]) > 0.8 * greedy["dense"].tokens
    assert results["sampling"]["dense"].answers != greedy["dense"].answers


def test_dialogue(example: Any, bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dialogue = example("dialogue")
    outputs = dialogue.main(str(bundled), new_tokens=16)
    check_heads(outputs, answers=len(dialogue.QUESTIONS))
    written = AutoTokenizer.from_pretrained(bundled).decode(outputs["dense"].answers[0], skip_special_tokens=True)
    assert capsys.readouterr().out.count(written) == 3  # streamed once with each head, which agree


def test_turns_with_one_cache_are_those_without(example: Any, bundled: Path) -> None:
    dialogue = example("dialogue")
    model, tokenizer = example("common").load(bundled)
    tokenizer.chat_template = dialogue.PLAIN_TEMPLATE
    kept, fresh = (dialogue.Dialogue(model, tokenizer, new_tokens=12) for _ in range(2))
    for question in dialogue.QUESTIONS:
        fresh.cache, fresh.cached_ids = DynamicCache(), []
        assert kept.say(question, "dense") == fresh.say(question, "dense")
    assert kept.reused > 40
    assert fresh.reused == 0


def test_question_answering(example: Any, bundled: Path) -> None:
    outputs, right = example("question_answering").main(str(bundled), new_tokens=12)
    check_heads(outputs, answers=10)
    assert right["lossless"] == right["dense"]


def test_translation(example: Any, bundled: Path) -> None:
    outputs, chrf = example("translation").main(str(bundled), new_tokens=12)
    check_heads(outputs, answers=8)
    assert chrf["lossless"] == chrf["dense"] > 0


def test_ranking(example: Any, bundled: Path) -> None:
    ranking = example("ranking")
    rankings = ranking.main(str(bundled))
    taus = [one.tau for one in rankings.values()]
    assert taus[0] == pytest.approx(1)
    assert 0.4 < taus[1] < taus[-1] < 1
    model, tokenizer = example("common").load(bundled)
    model.head_mode = "dense"
    document, query = ranking.DOCUMENTS[0]
    # The loss of Transformers on the same tokens is the mean of the same log-likelihoods.
    before = tokenizer(f"{document}\n\nIn short:", return_tensors="pt")["input_ids"]
    asked = tokenizer(f" {query}", return_tensors="pt")["input_ids"]
    labels = torch.cat([torch.full_like(before, -100), asked], dim=1)
    loss = model(input_ids=torch.cat([before, asked], dim=1), labels=labels).loss.item()
    assert ranking.likelihood(model, tokenizer, document, query) == pytest.approx(-loss, abs=1e-4)


def test_assisted_generation(example: Any, bundled: Path) -> None:
    outputs = example("assisted_generation").main(str(bundled), new_tokens=24)
    alone = outputs["target alone"]
    assert all(output.answers == alone.answers for output in outputs.values())
