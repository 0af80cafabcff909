"""What is known of a converted model: from its folder, from a text, and from the figures of a benchmark."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.facts import tiny_facts
from support.seq2seq_models import tiny_pairs, tiny_speech, tiny_translator, tiny_whisper_checkpoint
from support.tiny_models import QUICK, tiny_checkpoint, tiny_text

from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.evaluation.fidelity import measure_fidelity
from hf_topk.inspection.facts import measure_on, read_facts
from hf_topk.inspection.speed import Speed
from hf_topk.model.errors import InputError
from hf_topk.windows import make_windows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a model that was converted on it."""
    folder = tmp_path_factory.mktemp("made")
    text = tiny_text(folder / "text.jsonl")
    tiny_checkpoint(folder / "model")
    convert_checkpoint(
        str(folder / "model"), folder / "out", Recipe(text=str(text), num_experts_per_tok=2, **QUICK), html_report=True
    )
    return folder


def test_a_conversion_leaves_what_it_saw(made: Path) -> None:
    facts = read_facts(str(made / "out"))
    seen, metrics = facts.observations, facts.metrics
    assert facts.name == "out"
    assert seen.text == "held-out documents of text.jsonl"
    assert facts.measured_on == f"{metrics['positions']:,} positions of held-out documents of text.jsonl"
    assert seen.positions == metrics["positions"]
    assert seen.missed == round((1 - metrics["agreement"]) * seen.positions)
    assert sum(seen.picks) == 2 * seen.positions
    assert sum(one.pairs for one in seen.calibration) % facts.model.head.num_experts == 0


def test_the_page_of_a_conversion_is_that_of_its_folder(made: Path) -> None:
    from hf_topk.inspection.page import make_page

    assert (made / "out" / "report.html").read_text(encoding="utf-8") == make_page(read_facts(str(made / "out")))


def test_experts_are_in_order_of_use_and_tokens_of_likelihood() -> None:
    facts = tiny_facts(num_experts=7, num_always_on=3)  # the last expert has a single token
    order = facts.experts_by_use()
    assert sorted(order) == list(range(7))
    picks = [facts.observations.picks[expert] for expert in order]
    assert picks == sorted(picks, reverse=True)
    head = facts.model.head
    for expert, tokens in enumerate(facts.tokens_of(range(7))):
        prior = dict(zip(head.expert_ids[expert].tolist(), head.tail.log_prior[expert].tolist(), strict=True))
        assert tokens == facts.texts(sorted(prior, key=lambda token: -prior[token]))
    assert len(facts.tokens_of([6])[0]) == 1
    assert facts.always_on() == facts.texts(head.always_on_ids.tolist())


def test_a_token_without_text_is_shown_by_its_number() -> None:
    facts = tiny_facts()
    facts.tokenizer.batch_decode = lambda rows: ["" for _ in rows]
    assert facts.texts([7, 12]) == ["[7]", "[12]"]


def test_other_text_is_measured_instead(made: Path, tmp_path: Path) -> None:
    before = read_facts(str(made / "out"), runs=True)
    text = tiny_text(tmp_path / "other.jsonl", documents=2, words=100)
    facts = measure_on(before, str(text), 150)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    fidelity = measure_fidelity(facts.model, make_windows(documents, facts.tokenizer, 128, 150, seed=0))
    assert facts.metrics["agreement"] == fidelity.agreement
    assert facts.metrics["positions"] == facts.observations.positions == 150
    assert facts.metrics["added_bytes"] == before.metrics["added_bytes"]
    assert [point["num_experts_per_tok"] for point in facts.metrics["curve"]] == [1, 2, 4, 6]
    assert facts.measured_on == f"150 positions of {text}"
    assert facts.model.head.num_experts_per_tok == 2


DAMAGE = {
    "report.json": ("{", '{"picks": []}', "[1]", '{"calibration": [{}], "misses": []}'),
    "figures.json": ('{"agree', "[1]"),
    "recipe.yaml": ("text: [", "- 1", "text"),
}


@pytest.mark.parametrize(("file", "content"), [(file, one) for file, some in DAMAGE.items() for one in some])
def test_damaged_files_are_refused(file: str, content: str, made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    (out / file).write_text(content)
    with pytest.raises(InputError, match=f"{file} of .*out is damaged .*remove it"):
        read_facts(str(out))


def test_observations_of_another_model_are_refused(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    found = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({**found, "picks": found["picks"][1:]}))
    with pytest.raises(InputError, match="of another model: remove it"):
        read_facts(str(out))


def test_a_folder_without_them_is_known_without_them(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    (out / "report.json").unlink()
    facts = read_facts(str(out))
    assert facts.observations is None
    assert facts.metrics["agreement"] > 0
    assert "held-out documents of the calibration text" in facts.measured_on
    (out / "figures.json").unlink()
    (out / "recipe.yaml").unlink()
    facts = read_facts(str(out))
    assert (facts.metrics, facts.recipe, facts.choices()) == ({}, {}, [])


@pytest.mark.slow
@pytest.mark.parametrize("reads", ["text", "speech"])
def test_a_model_with_an_encoder_is_measured_on_what_it_reads(reads: str, tmp_path: Path) -> None:
    if reads == "text":
        text = tiny_pairs(tmp_path / "pairs.jsonl")
        tiny_checkpoint(tmp_path / "model", tiny_translator()[0])
    else:
        text = tiny_speech(tmp_path / "speech")
        tiny_whisper_checkpoint(tmp_path / "model")
    recipe = Recipe.from_dict({**QUICK, "text": str(text), "positions": 400, "num_experts_per_tok": 2})
    convert_checkpoint(str(tmp_path / "model"), tmp_path / "out", recipe, html_report=True)
    facts = read_facts(str(tmp_path / "out"), runs=True)
    measured = measure_on(facts, str(text), None)
    seen = measured.observations
    assert seen.positions > facts.observations.positions > 0
    assert sum(seen.picks) == 2 * seen.positions
    assert seen.missed == round((1 - measured.metrics["agreement"]) * seen.positions)
    assert all(miss.before for miss in seen.misses)


# Speed


def bench_figures(**choices: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 100, "num_experts": 6, "num_experts_per_tok": 2}
    return {
        "machine": "a laptop",
        "threads": 4,
        "dtype": "bfloat16",
        "sizes": sizes,
        "e2e": {"dense_tok_s": 10.0, "int8_tok_s": None, "sparse_tok_s": 20.0},
        "spread": {"e2e": {"dense_tok_s": [9.0, 11.0], "sparse_tok_s": [19.0, 21.0]}},
        **choices,
    }


def test_the_speed_is_what_bench_printed(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(bench_figures()))
    speed = Speed.read(file, tiny_facts().model.head)
    assert speed.circumstances == "a laptop, 4 threads, bfloat16"
    assert {name: (rate.median, rate.low, rate.high) for name, rate in speed.by_name.items()} == {
        "dense": (10.0, 9.0, 11.0),
        "sparse": (20.0, 19.0, 21.0),
    }


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot read .*bench.json: No such file"),
        ("{", "is not what `hf-topk bench DIR --json` prints"),
        ("[]", "is not what"),
        (json.dumps({"e2e": {}}), "is not what"),
        (
            json.dumps(bench_figures(sizes={"vocab_size": 7})),
            "of another model: its vocab_size is 7, this model's is 100",
        ),
    ],
)
def test_refuses_what_is_not_the_speed_of_this_model(content: str | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=reason):
        Speed.read(file, tiny_facts().model.head)
