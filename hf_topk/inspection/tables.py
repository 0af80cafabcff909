"""The report of a converted model as tables for a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..console import print_rows, print_table
from ..evaluation.observations import CAUSES, Miss, Observations
from .facts import Facts

TOKENS_SHOWN = 8  # of an expert
MISSES_SHOWN, CHARACTERS_BEFORE = 10, 40


@dataclass(frozen=True)
class Table:
    """Rows for people.

    Attributes:
        title: of the table.
        columns: names of the columns; empty for a list of names and values.
        rows: cells, as many as columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def print_tables(facts: Facts, experts: int) -> None:
    """Print the tables of a model; see [`tables`]."""
    for table in tables(facts, experts):
        if table.columns:
            print_rows(table.title, table.columns, table.rows)
        else:
            print_table(table.title, {row[0]: row[1] for row in table.rows})
        print()


def tables(facts: Facts, experts: int) -> Iterator[Table]:
    """Yield the tables of a model: figures, agreement at other k, speed, misses, recipe, and experts by use.

    Args:
        facts: of the model.
        experts: how many to list, at most.
    """
    yield Table(facts.name, (), list(_figures(facts)))
    if curve := facts.metrics.get("curve"):
        yield Table("Agreement against bytes read", ("k", "agreement", "bytes read", ""), list(_curve(facts, curve)))
    if facts.observations:
        yield from _seen(facts.observations, facts)
    if facts.speed:
        rates = [(rate.name, f"{rate.median:.1f}", f"{rate.low:.1f} to {rate.high:.1f}") for rate in facts.speed.rates]
        yield Table(f"Speed: {facts.speed.circumstances}", ("decoding", "tokens/s", "quartiles"), rates)
    if facts.recipe:
        yield Table("Recipe", (), [choice[:2] for choice in facts.choices()])
    yield _experts(facts, experts)


def _figures(facts: Facts) -> Iterator[tuple[str, str]]:
    model, head, metrics = facts.model, facts.model.head, facts.metrics
    yield "dense model", f"{type(model.base).__name__}, head of {head.out_features:,} x {head.in_features:,}"
    exact = f"{head.num_rescored:,} exact logits" if head.screens else "exact logits of all their tokens"
    yield (
        "experts",
        f"{head.num_experts:,} of {head.expert_size} tokens, {head.num_experts_per_tok:,} picked per position, "
        f"{exact}, {head.num_always_on:,} always-on tokens; combine {model.config.combine}",
    )
    yield "bytes read", f"{head.bytes_read() / head.dense_bytes():.1%} of the dense head"
    if not metrics:
        yield "metrics", "none in this folder: measure them on a text of yours with --text FILE"
        return
    yield "measured on", facts.measured_on
    yield (
        "top-1 agreement",
        f"{metrics['agreement']:.2%}, at least {metrics['agreement_lower_bound']:.2%} with 95 % confidence",
    )
    yield "top-5 recall", f"{metrics['top5_containment']:.2%}"
    yield "KL divergence", f"{_number(metrics['kl'], 4)} nats"
    dense, sparse = (_number(metrics[f"perplexity_{head}"], 2) for head in ("dense", "sparse"))
    yield "perplexity", f"{dense} dense, {sparse} sparse"
    if "added_bytes" in metrics:
        megabytes = metrics["added_bytes"] / 1e6
        yield "added on disk", f"{megabytes:.1f} MB, {metrics['added_bytes_share']:.1%} of the head"
    if facts.observations is None:
        yield "use of the experts", "not in this folder: measure it on a text of yours with --text FILE"


def _curve(facts: Facts, curve: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for point in curve:
        k = point["num_experts_per_tok"]
        is_own = k == facts.model.head.num_experts_per_tok
        yield f"{k:,}", f"{point['agreement']:.2%}", f"{point['bytes_read']:.1%}", "this model" if is_own else ""


def _seen(seen: Observations, facts: Facts) -> Iterator[Table]:
    """Calibration of the router, load of the experts, and misses."""
    bins = [(f"{one.predicted:.4%}", f"{one.dense:.4%}", f"{one.pairs:,}") for one in seen.calibration]
    columns = ("by the router", "by the dense head", "pairs of position and expert")
    yield Table("Router calibration: mean probability of an expert", columns, bins)
    load = [
        ("if all were alike", f"each expert picked at {facts.model.head.num_experts_per_tok / len(seen.picks):.1%}"),
        ("busiest tenth", f"{seen.share_of_busiest:.0%} of all picks"),
        ("never picked", f"{seen.picks.count(0):,} of {len(seen.picks):,}"),
    ]
    yield Table("Load of the experts", (), load)
    misses = [_miss(miss, facts) for miss in seen.misses[:MISSES_SHOWN]]
    title = f"Worst misses, {len(misses):,} of {seen.missed:,}"
    yield Table(title, ("dense", "sparse", "why", "after"), misses)


def _miss(miss: Miss, facts: Facts) -> tuple[str, ...]:
    dense, sparse = map(repr, facts.texts([miss.dense, miss.sparse]))
    after = repr(facts.tokenizer.decode(miss.before)[-CHARACTERS_BEFORE:])
    return (
        f"{dense} {miss.dense_probability:.1%}",
        f"{sparse} {miss.sparse_probability:.1%} (dense: {miss.dense_probability_of_sparse:.1%})",
        CAUSES[miss.cause],
        after,
    )


def _experts(facts: Facts, count: int) -> Table:
    seen, head = facts.observations, facts.model.head
    experts = facts.experts_by_use()[:count]
    rows = [("always on", "100.00%", _shown(facts.always_on()))] if head.num_always_on else []
    for expert, tokens in zip(experts, facts.tokens_of(experts), strict=True):
        use = f"{seen.picks[expert] / seen.positions:.2%}" if seen else ""
        rows.append((f"{expert:,}", use, _shown(tokens)))
    title = f"Experts, {len(experts):,} of {head.num_experts:,}" + (", the most used first" if seen else "")
    return Table(title, ("expert", "picked at", "tokens, likeliest first"), rows)


def _shown(tokens: list[str]) -> str:
    shown = " ".join(map(repr, tokens[:TOKENS_SHOWN]))
    return shown if len(tokens) <= TOKENS_SHOWN else f"{shown} and {len(tokens) - TOKENS_SHOWN:,} more"


def _number(value: float | None, digits: int) -> str:
    return "infinite" if value is None else f"{value:,.{digits}f}"
