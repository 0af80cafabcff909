"""The choice of the ranks of router and screen."""

from typing import Any

import pytest
from support.tiny_models import QUICK, some_windows, tiny_dense

from hf_topk.convert import convert
from hf_topk.convert.recipe import ROUTER_RANK, TAIL_RANK, Recipe
from hf_topk.convert.report import Report
from hf_topk.convert.steps import choose_ranks as module
from hf_topk.convert.steps.pack_router_and_tail import Quantiser, Ranks
from hf_topk.model.kernels import COLUMNS_OF_GROUPS, COLUMNS_OF_KERNEL
from hf_topk.model.packed_rows import PackedRows

OPEN = {"router_rank": None, "tail_rank": None, "held_out": 0.5, "expert_size": 4, "target_agreement": 0.9}


def converted(**choices: Any) -> Report:
    recipe = Recipe(**{**QUICK, **OPEN, "allow_below_target": True, **choices})
    return convert(tiny_dense(), None, recipe, windows=some_windows(40))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Ranks]:
    """Sizes of a tiny head; returns those that are tried, without the return to the best."""
    monkeypatch.setattr(module, "ROUTER_RANK", 24)
    monkeypatch.setattr(module, "TAIL_RANK", 24)
    monkeypatch.setattr(module, "SMALLER_ROUTER_RANKS", (12, 6))
    monkeypatch.setattr(module, "SMALLER_TAIL_RANKS", (12, 6))
    tried: list[Ranks] = []
    quantise = Quantiser.__call__

    def watched(self: Quantiser, ranks: Ranks) -> None:
        if ranks not in tried:
            tried.append(ranks)
        quantise(self, ranks)

    monkeypatch.setattr(Quantiser, "__call__", watched)
    return tried


def test_no_neighbour_that_was_tried_reads_less(small: list[Ranks]) -> None:
    report = converted()
    tried = list(small)
    assert tried[0] == (24, 24)
    assert len(tried) >= 3
    chosen = Ranks(report.model.config.router_rank, report.model.config.tail_rank)
    assert chosen in tried
    for ranks in tried:
        alone = converted(router_rank=ranks.router, tail_rank=ranks.tail)
        assert (alone.metrics()["target_reached"], -alone.fidelity.bytes_read) <= (
            report.metrics()["target_reached"],
            -report.fidelity.bytes_read,
        )


def test_the_chosen_head_is_that_of_a_conversion_at_its_ranks(small: list[Ranks]) -> None:
    report = converted()
    config = report.model.config
    alone = converted(router_rank=config.router_rank, tail_rank=config.tail_rank)
    additions = report.model.head.additions()
    assert additions.keys() == alone.model.head.additions().keys()
    assert all(one.equal(additions[name]) for name, one in alone.model.head.additions().items())
    assert report.fidelity == alone.fidelity
    assert (report.metrics()["router_rank"], report.metrics()["tail_rank"]) == (config.router_rank, config.tail_rank)


@pytest.mark.parametrize(("given", "other"), [("router_rank", "tail"), ("tail_rank", "router")])
def test_a_given_rank_stays(given: str, other: str, small: list[Ranks]) -> None:
    report = converted(**{given: 9})
    assert getattr(report.model.config, given) == 9
    assert {getattr(one, given.removesuffix("_rank")) for one in small} == {9}
    assert len({getattr(one, other) for one in small}) > 1


def test_a_given_k_takes_the_default_ranks(small: list[Ranks]) -> None:
    report = converted(num_experts_per_tok=2, target_agreement=None, allow_below_target=False)
    assert small == [(24, 24)]
    assert (report.model.config.router_rank, report.model.config.tail_rank) == (24, 24)


def test_lower_ranks_are_tried_while_they_read_less(monkeypatch: pytest.MonkeyPatch, small: list[Ranks]) -> None:
    qualities = {(24, 24): (0.9, -0.5), (12, 24): (0.9, -0.4), (6, 24): (0.8, -0.1), (12, 12): (0.9, -0.4)}
    monkeypatch.setattr(module, "fewest_bytes", lambda *_: qualities[small[-1]])
    config = converted().model.config
    assert small == list(qualities)
    assert (config.router_rank, config.tail_rank) == (12, 24)


def test_all_ranks_suit_the_kernels() -> None:
    """Of 4 bits, for the router, and of int8."""
    routers, tails = {ROUTER_RANK, *module.SMALLER_ROUTER_RANKS}, {TAIL_RANK, *module.SMALLER_TAIL_RANKS}
    assert all(PackedRows(4, (3,), rank).basis.shape[0] % min(COLUMNS_OF_GROUPS) == 0 for rank in routers)
    assert all(PackedRows(4, (3, 2), rank).basis.shape[0] % COLUMNS_OF_KERNEL == 0 for rank in tails)
