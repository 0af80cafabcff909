"""The choice of k and R: the chosen operating point, and refused targets."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.command_line import contents, run_main
from support.tiny_models import QUICK, VOCAB_SIZE, tiny_checkpoint, tiny_converted, tiny_dense, tiny_text
from torch import Tensor
from torch.nn import functional as F

from hf_topk import TopKExpertsForCausalLM, TopKExpertsHead
from hf_topk.convert import convert
from hf_topk.convert.recipe import Recipe
from hf_topk.convert.steps import choose_operating_point as operating_point
from hf_topk.convert.steps.choose_operating_point import (
    OperatingPoint,
    Target,
    TargetNotReachedError,
    agrees,
    choose_num_rescored,
    choose_operating_point,
    rank_argmax,
)
from hf_topk.convert.steps.distill import expert_masses, groups_of, start_router
from hf_topk.convert.steps.held_out import DenseArgmax, dense_argmax
from hf_topk.convert.steps.pack_router_and_tail import fit_tail, metric_of, pack_router
from hf_topk.evaluation.fidelity import measure_fidelity
from hf_topk.model import kernels
from hf_topk.windows import Window

# The last expert is 7 tokens short.
SIZES = {"num_always_on": 8, "num_experts": 9, "expert_size": 11}
# Always-on tokens, experts and their size: with repeats that fill up the last expert, few or many, and without.
LAYOUTS = [(8, 6, 16), (4, 6, 16), (8, 3, 40), (10, 13, 7), (0, 25, 4)]


def some_windows(documents: tuple[int, ...] = (5, 5, 0, 2), seed: int = 3) -> list[Window]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (2, 17, 40, 33)
    return [
        Window(document, tuple(torch.randint(VOCAB_SIZE, (lengths[number % 4],), generator=generator).tolist()))
        for number, document in enumerate(documents)
    ]


def random_argmax(head: TopKExpertsHead, positions: int = 400) -> DenseArgmax:
    """The dense argmax at random states of ten documents."""
    states = torch.randn(positions, 32, generator=torch.Generator().manual_seed(8))
    return DenseArgmax(
        states,
        F.linear(states, head.weight, head.bias).argmax(dim=-1),
        torch.arange(positions) % 10,
        kinds=torch.zeros(positions, dtype=torch.long),
    )


def fitted(**sizes: int) -> TopKExpertsForCausalLM:
    """A model whose router and screen approximate the dense head roughly."""
    model = tiny_converted(**{"router_rank": 12, "tail_rank": 12, **sizes})
    head = model.head.requires_grad_(False)
    head.weight.mul_(0.05)
    states = torch.randn(500, 32, generator=torch.Generator().manual_seed(4))
    head.router.unpack()
    start_router(head.router, states, expert_masses(states, head.weight, None, groups_of(head)))
    pack_router(head.router, metric_of(states), torch.float32)
    fit_tail(head, metric_of(states), F.linear(states, head.weight).softmax(dim=-1).mean(dim=0), [])
    return model


@pytest.fixture(scope="module")
def model() -> TopKExpertsForCausalLM:
    return fitted(**SIZES)


@pytest.fixture(scope="module")
def dense(model: TopKExpertsForCausalLM) -> DenseArgmax:
    return random_argmax(model.head)


def settings_of(head: TopKExpertsHead) -> Iterator[OperatingPoint]:
    """All operating points of a few experts; each is measured."""
    for k in range(1, head.num_experts + 1):
        most, rescored = k * head.expert_size, 16
        while rescored < most:
            yield OperatingPoint(k, rescored)
            rescored = max(rescored + 1, round(rescored * 1.15))
        yield OperatingPoint(k, most)


@torch.no_grad()
def gets_exact_logit(head: TopKExpertsHead, dense: DenseArgmax) -> Tensor:
    """Whether the dense argmax gets an exact logit from the head itself."""
    return (head.score(dense.states).ids == dense.best.unsqueeze(-1)).any(dim=-1)


def tried_out(model: TopKExpertsForCausalLM, dense: DenseArgmax) -> list[tuple[float, float, float, OperatingPoint]]:
    """Bytes read, lower bound, share of the dense argmax with an exact logit, and operating point, for all of them."""
    found = []
    for setting in settings_of(model.head):
        setting.apply(model)
        exact = gets_exact_logit(model.head, dense)
        share = model.head.bytes_read() / model.head.dense_bytes()
        found.append((share, dense.bound(exact), float(exact.double().mean()), setting))
    return found


def chosen_by(model: TopKExpertsForCausalLM) -> OperatingPoint:
    head, config = model.head, model.config
    assert (config.num_experts_per_tok, config.num_rescored) == (head.num_experts_per_tok, head.num_rescored)
    return OperatingPoint(head.num_experts_per_tok, head.num_rescored)


def as_run(setting: OperatingPoint) -> OperatingPoint:
    """The operating point that runs: with all experts picked there is no screen, for any R."""
    return OperatingPoint(9, 99) if setting.num_experts_per_tok == 9 else setting


@pytest.mark.parametrize(("k", "rescored"), [(1, 256), (3, 20), (6, 256)])
def test_agreement_and_its_bound_equal_those_of_fidelity(k: int, rescored: int) -> None:
    model, windows = tiny_converted(num_experts_per_tok=k, num_rescored=rescored), some_windows()
    dense, fidelity = dense_argmax(model, windows), measure_fidelity(model, windows)
    agreed = agrees(model.head, dense)
    assert float(agreed.double().mean()) == pytest.approx(fidelity.agreement)
    assert dense.bound(agreed) == pytest.approx(fidelity.agreement_lower_bound)
    assert (fidelity.agreement == 1) == (k == 6)


# Ranks of the dense argmax


@pytest.mark.parametrize(("always_on", "experts", "size"), LAYOUTS)
def test_ranks_equal_counting(always_on: int, experts: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating_point, "ESTIMATES_AT_ONCE", 7 * VOCAB_SIZE)  # so that blocks have edges
    head = fitted(num_always_on=always_on, num_experts=experts, expert_size=size).head
    dense = random_argmax(head, 40)
    ranks = rank_argmax(head, dense)
    assert (ranks.tried[0], ranks.tried[-1]) == (1, experts)
    scores, everything = head.router(dense.states), torch.arange(experts).expand(40, -1)
    screened = head.tail.screen(dense.states, everything)
    for position, best in enumerate(dense.best.tolist()):
        estimates: list[dict[int, float]] = []  # of each expert's tokens, which repeats do not add to
        for expert in range(experts):
            first = {}
            for place, token in enumerate(head.expert_ids[expert].tolist()):
                first.setdefault(token, float(screened[position, expert, place]))
            within = torch.tensor(list(first.values())).log_softmax(dim=-1) + scores[position, expert]
            estimates.append(dict(zip(first, within.tolist(), strict=True)))
        order = scores[position].argsort(descending=True).tolist()
        for which, k in enumerate(ranks.tried):
            tokens = {token: value for expert in order[:k] for token, value in estimates[expert].items()}
            rank = int(ranks.ranks[position, which])
            if best in head.always_on_ids:
                assert rank == -1
            elif best not in tokens:
                assert rank >= VOCAB_SIZE
            else:  # give or take what the order of sums makes of equal ones
                assert sum(value > tokens[best] + 1e-4 for value in tokens.values()) <= rank
                assert rank <= sum(value > tokens[best] - 1e-4 for value in tokens.values()) - 1


@pytest.mark.parametrize(("always_on", "experts", "size"), LAYOUTS)
def test_ranks_below_r_get_an_exact_logit(always_on: int, experts: int, size: int) -> None:
    model = fitted(num_always_on=always_on, num_experts=experts, expert_size=size)
    dense = random_argmax(model.head)
    ranks = rank_argmax(model.head, dense)
    found = set()
    for which, k in enumerate(ranks.tried):
        for rescored in (1, 3, 16, 30, 50, k * size - 1, k * size):
            if not 1 <= rescored <= k * size:
                continue
            OperatingPoint(k, rescored).apply(model)
            expected = gets_exact_logit(model.head, dense)
            if k < experts or rescored == k * size:
                assert torch.equal(ranks.agrees(which, rescored), expected)
                found.add(int(expected.sum()))
    assert len(found) > 5
    assert max(found) == len(dense.best)


# What is chosen


@pytest.mark.parametrize("tail_rank", [1, 12])
def test_reads_the_fewest_bytes_of_operating_points_that_reach_the_target(
    tail_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all targets; with a poor screen, rescoring all picked tokens reads fewer bytes."""
    monkeypatch.setattr(kernels, "FEW_POSITIONS", 0)  # or the rounding depends on how many are scored at once
    model = fitted(**SIZES, tail_rank=tail_rank)
    dense = random_argmax(model.head, 200)
    everything = tried_out(model, dense)
    for target in {bound for _, bound, _, _ in everything}:
        expected = min(share for share, bound, _, _ in everything if bound >= target)
        choose_operating_point(model, dense, rank_argmax(model.head, dense), Target(target))
        assert model.head.bytes_read() / model.head.dense_bytes() == pytest.approx(expected)
        assert dense.bound(gets_exact_logit(model.head, dense)) >= target


def test_neither_the_least_k_nor_the_least_r_reads_the_fewest_bytes(
    model: TopKExpertsForCausalLM, dense: DenseArgmax
) -> None:
    settings = []
    for share in (0.2, 0.5, 0.7, 0.8, 0.9, 0.95):
        choose_operating_point(model, dense, rank_argmax(model.head, dense), Target(share))
        settings.append(chosen_by(model))
    assert any(1 < one.num_experts_per_tok < 9 for one in settings)
    assert any(one.num_rescored < one.num_experts_per_tok * 11 for one in settings)
    assert len(set(settings)) >= 4


def test_a_limit_of_bytes_that_is_not_reached_changes_nothing(
    model: TopKExpertsForCausalLM, dense: DenseArgmax
) -> None:
    choose_operating_point(model, dense, rank_argmax(model.head, dense), Target(0.8))
    expected, share = chosen_by(model), model.head.bytes_read() / model.head.dense_bytes()
    choose_operating_point(model, dense, rank_argmax(model.head, dense), Target(0.8, max_bytes_read=share + 1e-9))
    assert chosen_by(model) == expected


@pytest.mark.parametrize("place", [0.1, 0.4, 0.7])
def test_within_the_bytes_the_point_of_highest_agreement_is_nearest(
    place: float, model: TopKExpertsForCausalLM, dense: DenseArgmax
) -> None:
    everything = tried_out(model, dense)
    choose_operating_point(model, dense, rank_argmax(model.head, dense), Target(0.95))
    least, most = min(one[0] for one in everything), model.head.bytes_read() / model.head.dense_bytes()
    limit = least + place * (most - least)
    within = [one for one in everything if one[0] <= limit]
    assert max(one[1] for one in within) < 0.95
    *_, expected = max(within, key=lambda one: (min(0.95, one[2]), -one[0]))
    choose_operating_point(model, dense, rank_argmax(model.head, dense), Target(0.95, max_bytes_read=limit))
    assert as_run(chosen_by(model)) == as_run(expected)
    assert model.head.bytes_read() / model.head.dense_bytes() <= limit


def test_the_cheapest_point_if_none_is_within_the_bytes(model: TopKExpertsForCausalLM, dense: DenseArgmax) -> None:
    choose_operating_point(model, dense, rank_argmax(model.head, dense), Target(0.5, max_bytes_read=1e-9))
    assert chosen_by(model) == OperatingPoint(1, 16)


def test_points_below_the_target_when_measured_are_skipped(
    model: TopKExpertsForCausalLM, dense: DenseArgmax, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tail may outscore exact logits, so a measured agreement can be below that of the ranks."""
    ranks = rank_argmax(model.head, dense)
    choose_operating_point(model, dense, ranks, Target(0.5))
    best, share = chosen_by(model), model.head.bytes_read() / model.head.dense_bytes()

    def all_but_best(head: TopKExpertsHead, dense: DenseArgmax) -> Tensor:
        agreed = gets_exact_logit(head, dense)
        while head.num_experts_per_tok == best.num_experts_per_tok and dense.bound(agreed) >= 0.5:
            agreed[agreed.nonzero()[0]] = False
        return agreed

    monkeypatch.setattr(operating_point, "agrees", all_but_best)
    choose_operating_point(model, dense, ranks, Target(0.5))
    assert chosen_by(model).num_experts_per_tok != best.num_experts_per_tok
    assert dense.bound(all_but_best(model.head, dense)) >= 0.5
    assert share < model.head.bytes_read() / model.head.dense_bytes() < 1.3 * share


@pytest.mark.parametrize("k", range(1, 10))
def test_at_a_given_k_the_least_r_that_loses_almost_no_agreement(
    k: int, model: TopKExpertsForCausalLM, dense: DenseArgmax
) -> None:
    at_k = [one for one in tried_out(model, dense) if one[3].num_experts_per_tok == k]
    if k == 9:  # the head does not screen then, but the screen is what would decide
        ranks = rank_argmax(model.head, dense)
        shares = [float(ranks.agrees(k - 1, one[3].num_rescored).double().mean()) for one in at_k]
    else:
        shares = [one[2] for one in at_k]
    expected = next(one[3] for one, share in zip(at_k, shares, strict=True) if share >= max(shares) - 0.001)
    OperatingPoint(k, 1).apply(model)
    choose_num_rescored(model, dense)
    assert chosen_by(model) == expected
    assert (expected.num_rescored < 11 * k) == (k > 1)


def test_a_given_k_is_kept_if_it_is_not_among_the_usual_ones() -> None:
    model = fitted(num_always_on=0, num_experts=25, expert_size=4)
    assert 11 not in rank_argmax(model.head, random_argmax(model.head)).tried
    model.num_experts_per_tok = 11
    choose_num_rescored(model, random_argmax(model.head))
    chosen = chosen_by(model)
    assert chosen.num_experts_per_tok == 11
    assert 16 <= chosen.num_rescored <= 44


def test_the_target_is_reached_on_each_kind_of_text(
    model: TopKExpertsForCausalLM, dense: DenseArgmax, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few positions of another kind, at which the argmax is in the expert that is picked last, take all experts."""
    monkeypatch.setattr("hf_topk.convert.steps.held_out.POOLED_POSITIONS", 1)
    last = model.head.router(dense.states).argmin(dim=-1)
    is_hard = torch.arange(len(dense.best)) % 40 == 0
    best = torch.where(is_hard, model.head.expert_ids[last, 0], dense.best)
    mixed = replace(dense, best=best, kinds=is_hard.long(), kind_names=("easy", "hard"))
    ranks = rank_argmax(model.head, mixed)
    choose_operating_point(model, replace(mixed, kinds=torch.zeros_like(best)), ranks, Target(0.9))
    assert model.num_experts_per_tok < 9
    choose_operating_point(model, mixed, ranks, Target(0.9))
    assert model.num_experts_per_tok == 9


# Through a conversion


def quick_windows() -> list[Window]:
    return some_windows(tuple(number // 2 for number in range(32)))


@pytest.mark.parametrize("choices", [{}, {"num_experts_per_tok": 2}])
def test_a_target_in_the_recipe_must_be_reached(choices: dict[str, int]) -> None:
    recipe = Recipe.from_dict({**QUICK, "target_agreement": 0.9999, **choices})
    with pytest.raises(TargetNotReachedError, match=r"the target agreement of 0\.9999 is not reached: its lower bound"):
        convert(tiny_dense(), None, recipe, windows=quick_windows())


def test_without_a_target_the_nearest_point_is_chosen() -> None:
    report = convert(tiny_dense(), None, Recipe.from_dict(QUICK), windows=quick_windows())
    metrics = report.metrics()
    assert metrics["agreement_lower_bound"] < 0.995  # so few positions cannot show it
    assert metrics["target_reached"] is False
    assert float(agrees(report.model.head, report.dense_argmax).double().mean()) == pytest.approx(metrics["agreement"])
    given = convert(tiny_dense(), None, Recipe.from_dict({**QUICK, "num_experts_per_tok": 2}), windows=quick_windows())
    assert given.metrics()["target_reached"] is None
    assert given.metrics()["agreement"] <= metrics["agreement"]
    assert given.model.head.num_experts_per_tok == 2


# On the command line

# Bad enough that a few experts are not enough.
WEAK = {"held_out": 0.5, "num_always_on": 0, "expert_size": 4, "router_rank": 1, "tail_rank": 1}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_checkpoint(tmp_path / "model")
    tiny_text(tmp_path / "text.jsonl", documents=8)
    lines = "\n".join(f"{name}: {value}" for name, value in {**QUICK, **WEAK}.items())
    (tmp_path / "recipe.yaml").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGUMENTS = ("convert", "model", "out", "--text", "text.jsonl", "--recipe", "recipe.yaml", "--json")


def test_converts_to_the_fewest_bytes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, *ARGUMENTS, "--target-agreement", 0.9) == 0
    metrics = json.loads(capsys.readouterr().out)
    chosen = metrics["num_experts_per_tok"]
    assert 1 < chosen < 25
    assert metrics["agreement_lower_bound"] >= 0.9
    assert metrics["target_reached"]
    written = json.loads((here / "out" / "config.json").read_text())
    assert (written["num_experts_per_tok"], written["num_rescored"]) == (chosen, metrics["num_rescored"])
    recipe = Recipe.from_yaml(here / "out" / "recipe.yaml")
    assert (recipe.num_experts_per_tok, recipe.num_rescored, recipe.target_agreement) == (None, None, 0.9)
    card = (here / "out" / "README.md").read_text()
    assert f"{100 * metrics['agreement_lower_bound']:.2f} %" in card
    assert "k and R are those that read the fewest bytes among all that reach 90.00 %" in card
    assert f"{metrics['positions']:,} positions of held-out documents of the calibration text (text.jsonl)" in card
    # A single one is refused.
    options = ("--target-agreement", 0.9, "--num-experts-per-tok", 1, "--overwrite")
    assert run_main(monkeypatch, *ARGUMENTS, *options) == 1
    assert "is not reached: its lower bound is" in capsys.readouterr().err


def test_writes_nothing_below_the_target(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    options = ("--target-agreement", 0.9, "--max-bytes-read", 0.15)
    assert run_main(monkeypatch, *ARGUMENTS, *options) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    message = printed.err.splitlines()[-1]
    assert message.startswith(
        "hf-topk: the target agreement of 0.9 is not reached within 15.0% of the bytes: its lower"
    )
    assert "--allow-below-target" in message
    assert contents(here) == before
    assert run_main(monkeypatch, *ARGUMENTS, *options, "--allow-below-target") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["agreement_lower_bound"] < 0.9
    assert not metrics["target_reached"]
    assert "the target of 90.00 % is **not reached**" in (here / "out" / "README.md").read_text()
