"""How many experts it takes to agree with the dense head: the bound, the choice of k, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import QUICK, VOCAB_SIZE, contents, run_main, tiny_checkpoint, tiny_converted, tiny_dense, tiny_text
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import calibrate, promise
from hf_topk.convert.calibrate import Target, choose_num_experts, highest_agreement, lower_bound, rank_experts
from hf_topk.convert.distill import start_router
from hf_topk.convert.fit_tail import fit_tail
from hf_topk.convert.recipe import Recipe
from hf_topk.errors import InputError
from hf_topk.measure.fidelity import Fidelity, measure_fidelity
from hf_topk.text import Window

NUM_EXPERTS = 6


def some_windows() -> list[Window]:
    generator = torch.Generator().manual_seed(3)
    lengths = (2, 17, 40, 33)
    ids = [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [Window(number, tuple(some)) for number, some in enumerate(ids)]


def bound_at(model: TopKExpertsForCausalLM, num_experts: int) -> float:
    model.head.num_experts_per_tok = num_experts
    fidelity = measure_fidelity(model, some_windows())
    return lower_bound(fidelity.agreement, fidelity.positions)


@settings(max_examples=60, deadline=None)
@given(positions=st.integers(1, 400), data=st.data())
def test_lower_bound_is_where_so_many_agree_with_5_percent(positions: int, data: st.DataObject) -> None:
    agreed = data.draw(st.integers(0, positions))
    bound = lower_bound(agreed / positions, positions)
    assert 0 <= bound <= agreed / positions
    if not agreed:
        assert bound == 0
        return
    # At an agreement of `bound`, as many as were seen or more agree in 5 % of the samples.
    chances = (
        math.comb(positions, n) * bound**n * (1 - bound) ** (positions - n) for n in range(agreed, positions + 1)
    )
    assert math.fsum(chances) == pytest.approx(0.05, rel=1e-6)


def test_lower_bound_of_full_agreement() -> None:
    assert lower_bound(1.0, 1000) == pytest.approx(0.05 ** (1 / 1000))


def test_experts_needed_is_the_rank_of_the_dense_argmax() -> None:
    model, windows = tiny_converted(), some_windows()
    head = model.head
    needed = rank_experts(model, windows).experts_needed.tolist()
    expected = []
    for window in windows:
        with torch.no_grad():
            states = model.base.model(torch.tensor([window.token_ids])).last_hidden_state[0]
            best, scores = torch.nn.functional.linear(states, head.weight).argmax(-1), head.router(states)
        for token, row in zip(best.tolist(), scores, strict=True):
            home = [expert for expert, ids in enumerate(head.expert_ids.tolist()) if token in ids]
            order = row.argsort(descending=True).tolist()
            expected.append(order.index(home[0]) + 1 if home else 0)
    assert needed == expected
    assert 0 in needed
    assert max(needed) > 2


@pytest.mark.parametrize("tail", ["low_rank", "none"])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_the_highest_agreement_lets_the_tail_win_but_not_lose(num_experts: int, tail: str) -> None:
    model, windows = tiny_converted(num_experts_per_tok=num_experts, tail=tail), some_windows()
    dense = rank_experts(model, windows)
    with torch.no_grad():
        agrees = model.head.sparse_logits(dense.states).argmax(dim=-1) == dense.best
    expected = (agrees | (dense.experts_needed <= num_experts)).double().mean()
    highest = highest_agreement(model.head, dense)
    assert highest == pytest.approx(float(expected))
    measured = measure_fidelity(model, windows).agreement
    assert (highest == measured) if tail == "none" else (1 > highest >= measured)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.85, 0.95])
@pytest.mark.parametrize("tail", ["low_rank", "none"])
def test_k_is_the_smallest_that_reaches_the_target(share: float, tail: str) -> None:
    model = tiny_converted(tail=tail)
    bounds = [bound_at(model, k) for k in range(1, NUM_EXPERTS + 1)]
    assert bounds == sorted(bounds)
    expected = next(k for k, bound in enumerate(bounds, 1) if bound >= share)
    measured = choose_num_experts(model, some_windows(), Target(share))
    assert measured == measure_fidelity(model, some_windows())
    assert model.head.num_experts_per_tok == model.config.num_experts_per_tok == expected


def test_k_stays_within_the_bytes() -> None:
    model = tiny_converted()
    limit = model.head.bytes_read(3) / model.head.dense_bytes()
    choose_num_experts(model, some_windows(), Target(0.999, max_bytes_read=limit + 1e-9))
    assert model.head.num_experts_per_tok == 3
    choose_num_experts(model, some_windows(), Target(0.999, max_bytes_read=1e-9))
    assert model.head.num_experts_per_tok == 1


@pytest.mark.parametrize(("share", "expected"), [(0.73, 1), (0.745, 2), (0.76, 2)])
def test_what_the_tail_gets_right_counts_within_the_bytes_too(share: float, expected: int) -> None:
    model, windows = tiny_converted(tail_rank=16, router_type="centroid"), some_windows()
    start_router(model.head)
    fit_tail(model.head, rank_experts(model, windows).states, torch.full((VOCAB_SIZE,), 1 / VOCAB_SIZE))
    needed, bounds = rank_experts(model, windows).experts_needed, [bound_at(model, k) for k in (1, 2)]
    assert lower_bound(float((needed <= 2).double().mean()), len(needed)) < 0.7 < bounds[0] < bounds[1]
    limit = model.head.bytes_read(2) / model.head.dense_bytes() + 1e-9
    choose_num_experts(model, windows, Target(share, max_bytes_read=limit))
    assert model.head.num_experts_per_tok == expected
    assert (bounds[expected - 1] >= share) == (share < 0.75)


# Bad enough that some experts are not enough.
WEAK = {"held_out": 0.5, "partition": "frequency", "router": "centroid", "num_always_on": 0}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_checkpoint(tmp_path / "model")
    tiny_text(tmp_path / "text.jsonl", documents=8)
    lines = "\n".join(f"{name}: {value}" for name, value in {**QUICK, **WEAK}.items())
    (tmp_path / "recipe.yaml").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGUMENTS = ("convert", "model", "out", "--text", "text.jsonl", "--recipe", "recipe.yaml", "--json")


def test_converts_with_the_fewest_experts(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, *ARGUMENTS, "--target-agreement", 0.9) == 0
    figures = json.loads(capsys.readouterr().out)
    chosen = figures["num_experts_per_tok"]
    assert 1 < chosen < NUM_EXPERTS
    assert figures["agreement_lower_bound"] >= 0.9
    assert figures["target_reached"]
    assert json.loads((here / "out" / "config.json").read_text())["num_experts_per_tok"] == chosen
    recipe = Recipe.from_yaml(here / "out" / "recipe.yaml")
    assert (recipe.num_experts_per_tok, recipe.target_agreement) == (None, 0.9)
    card = (here / "out" / "README.md").read_text()
    assert f"{100 * figures['agreement_lower_bound']:.2f} %" in card
    assert f"{chosen} experts were chosen as the fewest that reach 90.00 %" in card
    assert f"{figures['positions']:,} positions of held-out documents of the sample (text.jsonl)" in card
    # A single one is refused.
    options = ("--target-agreement", 0.9, "--num-experts-per-tok", 1, "--overwrite")
    assert run_main(monkeypatch, *ARGUMENTS, *options) == 1
    assert "is not reached: its lower bound is" in capsys.readouterr().err


def test_writes_nothing_below_the_target(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    options = ("--target-agreement", 0.9, "--max-bytes-read", 0.7)
    assert run_main(monkeypatch, *ARGUMENTS, *options) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    message = printed.err.splitlines()[-1]
    assert message.startswith(
        "hf-topk: the target agreement of 0.9 is not reached within 70.0% of the bytes: its lower"
    )
    assert "--allow-below-target" in message
    assert contents(here) == before
    assert run_main(monkeypatch, *ARGUMENTS, *options, "--allow-below-target") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["agreement_lower_bound"] < 0.9
    assert not figures["target_reached"]
    assert "the target of 90.00 % is **not reached**" in (here / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        ({"target_agreement": 99.5}, "target_agreement is 99.5, must be a share above 0 and below 1"),
        ({"target_agreement": 0}, "target_agreement is 0"),
        ({"target_agreement": 0.9, "max_bytes_read": 1.5}, "max_bytes_read is 1.5"),
        ({"max_bytes_read": 0.1}, "need a target_agreement"),
        ({"allow_below_target": True}, "need a target_agreement"),
        ({"target_agreement": 0.9, "routed_mass": 0.5}, "leave routed_mass at 1"),
    ],
)
def test_refuses_targets_that_make_no_sense(choices: dict[str, float], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Recipe.from_dict(choices)


def test_the_promise_is_summed_up_over_splits(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = iter([promise.Outcome(3, 0.91, 0.94, 10), promise.Outcome(5, 0.9, 0.88, 10)])
    splits: list[tuple[int, int]] = []

    def try_split(_: object, __: object, recipe: Recipe, windows: list[Window], seed: int) -> promise.Outcome:
        splits.append((seed, len({window.document for window in windows})))
        assert recipe.target_agreement == 0.9
        return next(outcomes)

    monkeypatch.setattr(promise, "try_split", try_split)
    promise.promise("model", "text.jsonl", target_agreement=0.9, positions=1600, splits=2)
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert splits == [(0, 8), (1, 8)]
    assert lines[0] == {
        "split": 0,
        "num_experts_per_tok": 3,
        "bound": 0.91,
        "agreement": 0.94,
        "positions": 10,
        "is_kept": True,
    }
    assert not lines[1]["is_kept"]
    assert last == {
        "splits": 2,
        "kept": 1,
        "num_experts_per_tok_median": 4,
        "num_experts_per_tok_min": 3,
        "num_experts_per_tok_max": 5,
        "agreement_median": pytest.approx(0.91),
        "agreement_min": 0.88,
        "agreement_max": 0.94,
    }


def test_a_split_is_measured_on_documents_that_nothing_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    windows = [
        Window(document, tuple(torch.randint(VOCAB_SIZE, (32,), generator=generator).tolist()))
        for document in range(20)
        for _ in range(2)
    ]
    seen: list[set[int]] = []

    def watched(model: TopKExpertsForCausalLM, some: list[Window]) -> Fidelity:
        seen.append({window.document for window in some})
        return measure_fidelity(model, some)

    monkeypatch.setattr(promise, "measure_fidelity", watched)
    monkeypatch.setattr(calibrate, "measure_fidelity", watched)
    recipe = Recipe.from_dict({**QUICK, "held_out": 0.25, "target_agreement": 0.9, "allow_below_target": True})
    outcome = promise.try_split(tiny_dense(), None, recipe, windows, 0)
    held_out, tested = seen[0], seen[-1]
    assert (len(held_out), len(tested)) == (4, 4)
    assert not held_out & tested
    assert outcome.positions == 4 * 64
    assert 1 <= outcome.num_experts_per_tok <= NUM_EXPERTS
    assert outcome.agreement >= 0.9
    assert promise.try_split(tiny_dense(), None, recipe, windows, 0) == outcome
