"""The report as tables for a terminal."""

import dataclasses

from support.facts import tiny_facts

from hf_topk.inspection.speed import Rate, Speed
from hf_topk.inspection.tables import Table, tables


def by_title(found: list[Table], beginning: str) -> Table:
    (table,) = (one for one in found if one.title.startswith(beginning))
    return table


def test_the_tables_have_all_there_is() -> None:
    facts = tiny_facts()
    speed = Speed("a laptop, 4 threads", [Rate("sparse", 20.0, 19.0, 21.5)])
    found = list(tables(dataclasses.replace(facts, speed=speed), 3))
    for table in found:
        assert table.rows
        assert all(len(row) == (len(table.columns) or 2) for row in table.rows)
    figures = dict(by_title(found, "tiny").rows)
    assert figures["top-1 agreement"].startswith(f"{facts.metrics['agreement']:.2%}")
    assert figures["measured on"] == f"{facts.observations.positions} positions of mine.txt"
    assert "6 of 16 tokens, 2 picked per position" in figures["experts"]
    curve = by_title(found, "Agreement against").rows
    assert [row[0] for row in curve if row[-1] == "this model"] == ["2"]
    assert len(by_title(found, "Router calibration").rows) == len(facts.observations.calibration)
    load = dict(by_title(found, "Load of the experts").rows)
    assert load["never picked"] == f"{facts.observations.picks.count(0)} of 6"
    misses = by_title(found, f"Worst misses, 10 of {facts.observations.missed}").rows
    worst = facts.observations.misses[0]
    assert misses[0][0] == f"{facts.texts([worst.dense])[0]!r} {worst.dense_probability:.1%}"
    assert dict(by_title(found, "Recipe").rows) == {"text": "mine.txt", "expert_size": "16", "max_bytes_read": "any"}
    assert by_title(found, "Speed: a laptop, 4 threads").rows == [("sparse", "20.0", "19.0 to 21.5")]
    always_on, *experts = by_title(found, "Experts, 3 of 6").rows
    assert always_on[0] == "always on"
    picks = facts.observations.picks
    for number, (name, use, tokens) in zip(facts.experts_by_use(), experts, strict=False):
        assert (name, use) == (str(number), f"{picks[number] / facts.observations.positions:.2%}")
        assert repr(facts.tokens_of([number])[0][0]) in tokens


def test_the_tables_say_what_was_not_measured() -> None:
    facts = dataclasses.replace(tiny_facts(), observations=None)
    found = list(tables(facts, 20))
    assert [table.title for table in found] == ["tiny", "Agreement against bytes read", "Recipe", "Experts, 6 of 6"]
    assert "--text FILE" in dict(found[0].rows)["use of the experts"]
    found = list(tables(dataclasses.replace(facts, metrics={}, recipe={}), 20))
    assert [table.title for table in found] == ["tiny", "Experts, 6 of 6"]
    assert "--text FILE" in dict(found[0].rows)["metrics"]


def test_what_no_terminal_should_get_is_escaped() -> None:
    facts = tiny_facts()
    facts.tokenizer.batch_decode = lambda rows: ["\x1b[31m" for _ in rows]
    for table in tables(facts, 20):
        assert "\x1b" not in str([*table.rows, table.title]).replace("\\x1b", "")
