"""The report as a page: whole in itself, whatever the tokens are, and clear on what was not measured."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.facts import tiny_facts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_topk.inspection.facts import Facts
from hf_topk.inspection.page import check_page, make_page, visible, write_page
from hf_topk.inspection.speed import Rate, Speed
from hf_topk.model.errors import InputError, TopKExpertsError

HOSTILE = ["</script><b>", "<!--", "\u202etfel", "\x00", "שלום", "&amp;", "'\"", "\n", "{{ 7 * 7 }}", "\u2028"]
VOID = ("meta", "input", "br")


class Parsed(HTMLParser):
    """Elements of a page in order, with the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def count(self, tag: str) -> int:
        return sum(tag == name for name, _ in self.elements)

    def data(self) -> dict[str, Any]:
        return json.loads(self.text["script"][0])


def hostile_tokenizer() -> PreTrainedTokenizerFast:
    words = [*HOSTILE, *(f"w{number}" for number in range(100 - len(HOSTILE)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def facts() -> Facts:
    return tiny_facts()


def test_the_page_needs_nothing_else(facts: Facts) -> None:
    page = make_page(facts)
    parsed = Parsed(page)
    assert parsed.open == []
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object")
        assert not {"src", "href", "onclick"} & set(attributes)
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_the_figures_are_the_metrics(facts: Facts) -> None:
    parsed = Parsed(make_page(facts))
    shown = " ".join(parsed.text["dd"])
    assert f"{100 * facts.metrics['agreement']:.2f} %" in shown
    assert f"{100 * facts.metrics['bytes_read']:.1f} %" in shown
    assert f"{facts.metrics['perplexity_sparse']:.2f}" in shown
    assert "tiny" in parsed.text["h1"]
    assert f"Measured on {facts.observations.positions} positions of mine.txt" in parsed.text["p"][0]
    assert "mine.txt" in parsed.text["td"]
    assert "any" in parsed.text["td"]  # max_bytes_read


def test_the_data_has_every_expert_and_token(facts: Facts) -> None:
    data = Parsed(make_page(facts)).data()
    head, seen = facts.model.head, facts.observations
    assert data["positions"] == seen.positions
    assert sorted(number for number, *_ in data["experts"]) == list(range(head.num_experts))
    picks = [expert[3] for expert in data["experts"]]
    assert picks == sorted(seen.picks, reverse=True)
    for number, x, y, pick, tokens in data["experts"]:
        assert pick == seen.picks[number]
        assert {0 <= place <= 1000 for place in (x, y)} == {True}
        ids = list(dict.fromkeys(head.expert_ids[number].tolist()))
        assert sorted(tokens) == sorted(facts.texts(ids))
    assert data["alwaysOn"] == [visible(token) for token in facts.always_on()]


def test_every_miss_is_shown(facts: Facts) -> None:
    parsed = Parsed(make_page(facts))
    assert parsed.count("li") == len(facts.observations.misses) > 0
    tokens = parsed.text["bdi"]
    for miss in facts.observations.misses:
        for token in facts.texts([miss.dense, miss.sparse]):
            assert visible(token) in tokens


def test_tokens_of_any_kind_stay_text() -> None:
    facts = tiny_facts(hostile_tokenizer())
    page = make_page(facts)
    parsed = Parsed(page)
    assert parsed.open == []
    assert parsed.count("script") == 2
    assert parsed.count("b") == 0
    data = parsed.data()
    tokens = {token for expert in data["experts"] for token in expert[4]} | set(data["alwaysOn"])
    assert {visible(token) for token in HOSTILE} <= tokens
    assert not re.search("[\x00\u202e\u2028]", page)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("\n\n", "⏎⏎"),
        ("\t", "\\u{9}"),
        ("a\u200bb", "a\\u{200B}b"),
        ("\u202e", "\\u{202E}"),
        ("\U000e0001", "\\u{E0001}"),
        ("é", "é"),
        ("中", "中"),
        ("\u00a0", "\\u{A0}"),
    ],
)
def test_every_character_can_be_seen(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_what_is_not_there_is_said(facts: Facts) -> None:
    page = make_page(dataclasses.replace(facts, metrics={}, recipe={}, observations=None))
    parsed = Parsed(page)
    assert page.count("Not measured") == 5
    assert "--text FILE" in page
    assert "hf-topk bench DIR --json" in page
    assert "no metrics of its conversion" in page
    assert "no recipe.yaml" in page
    data = parsed.data()
    assert data["positions"] is None
    assert [number for number, *_ in data["experts"]] == list(range(facts.model.head.num_experts))


def test_metrics_that_are_no_numbers_are_shown(facts: Facts) -> None:
    metrics = {**facts.metrics, "perplexity_dense": None, "perplexity_sparse": None}
    assert "infinite" in make_page(dataclasses.replace(facts, metrics=metrics))


def test_nothing_missed_and_nothing_kept_are_told_apart(facts: Facts) -> None:
    kept = dataclasses.replace(facts, observations=facts.observations.without_text())
    assert "not published with the model" in make_page(kept)
    none = dataclasses.replace(facts, observations=dataclasses.replace(kept.observations, missed=0))
    assert "None: both heads had the same likeliest token" in make_page(none)


def test_the_speed_is_shown_if_it_was_measured(facts: Facts) -> None:
    rates = [Rate("dense", 10.0, 9.0, 11.0), Rate("sparse", 20.0, 19.0, 21.5)]
    page = make_page(dataclasses.replace(facts, speed=Speed("a laptop, 4 threads, bfloat16", rates)))
    assert "a laptop, 4 threads, bfloat16" in page
    assert "20.0 tokens/s" in page
    assert re.findall(r'class="bar" style="width: ([\d.]+)%"', page) == ["50.0", "100.0"]


def test_an_earlier_page_stays_if_writing_fails(facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("before")

    def fail(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(TopKExpertsError, match="No space left"):
        write_page(facts, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "before"


def test_refuses_a_place_that_cannot_hold_the_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder"):
        check_page(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        check_page(tmp_path / "gone" / "report.html")
