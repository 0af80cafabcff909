"""The lower bound of an agreement over documents, against the bound for independent positions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from hf_topk.evaluation.confidence_bound import lower_bound


def clopper_pearson(agreed: int, positions: int) -> float:
    """The one-sided 95 % bound of positions that are independent of one another."""
    return float(beta.ppf(0.05, agreed, positions - agreed + 1)) if agreed else 0.0


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """The number of positions that agree, and of all positions, of each document."""
    positions = draw(st.lists(st.integers(1, 200), min_size=1, max_size=12))
    return [draw(st.integers(0, count)) for count in positions], positions


@settings(max_examples=60, deadline=None)
@given(positions=st.integers(1, 400), data=st.data())
def test_the_bound_of_a_single_document_is_exact(positions: int, data: st.DataObject) -> None:
    agreed = data.draw(st.integers(0, positions))
    bound = lower_bound([agreed], [positions])
    if not agreed:
        assert bound == 0
        return
    # At an agreement of `bound`, as many as were seen or more agree in 5 % of the samples.
    chances = (
        math.comb(positions, n) * bound**n * (1 - bound) ** (positions - n) for n in range(agreed, positions + 1)
    )
    assert math.fsum(chances) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("positions", [1, 37, 1000])
def test_full_agreement_of_a_single_document(positions: int) -> None:
    assert lower_bound([positions], [positions]) == pytest.approx(0.05 ** (1 / positions))


@settings(max_examples=300, deadline=None)
@given(documents())
def test_the_bound_is_at_most_that_of_independent_positions(drawn: tuple[list[int], list[int]]) -> None:
    agreed, positions = drawn
    bound = lower_bound(agreed, positions)
    assert 0 <= bound <= sum(agreed) / sum(positions)
    assert bound <= clopper_pearson(sum(agreed), sum(positions)) + 1e-9


@settings(max_examples=100, deadline=None)
@given(documents(), st.randoms())
def test_the_order_of_documents_does_not_matter(drawn: tuple[list[int], list[int]], random: object) -> None:
    pairs = list(zip(*drawn, strict=True))
    random.shuffle(pairs)
    assert lower_bound(*zip(*pairs, strict=True)) == pytest.approx(lower_bound(*drawn))


@pytest.mark.parametrize("share", [0.6, 0.9, 0.99])
def test_documents_that_vary_as_independent_positions_do_count_each_position(share: float) -> None:
    positions = [100] * 2000
    agreed = np.random.default_rng(0).binomial(100, share, size=2000)
    off = (agreed - agreed.mean()) ** 2  # scaled to vary just as much, not as much as happened to be drawn
    mean = agreed.mean()
    scaled = mean + (agreed - mean) * math.sqrt(100 * mean / 100 * (1 - mean / 100) / off.mean())
    expected = float(beta.ppf(0.05, mean * 2000, (100 - mean) * 2000 + 1))
    assert lower_bound(scaled.tolist(), positions) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("agreed", [1, 50, 190, 199])
def test_documents_of_one_position_are_independent_positions(agreed: int) -> None:
    """Less one, as their variance is estimated."""
    bound = lower_bound([1] * agreed + [0] * (200 - agreed), [1] * 200)
    assert bound == pytest.approx(float(beta.ppf(0.05, agreed / 200 * 199, (1 - agreed / 200) * 199 + 1)))
    assert bound == pytest.approx(clopper_pearson(agreed, 200), abs=1e-3)


def test_the_bound_falls_with_the_dependence_within_documents() -> None:
    """For the same agreement, equal in all documents or different between them."""
    spreads = range(11)
    bounds = [lower_bound([90 - spread, 90 + spread] * 15, [100] * 30) for spread in spreads]
    assert bounds == sorted(bounds, reverse=True)
    # Below the deviation of independent positions, 3 of 100, nothing is lost, and nothing is gained.
    assert bounds[0] == bounds[2]
    assert all(below < above for above, below in itertools.pairwise(bounds[3:]))
    assert 0.85 < bounds[-1] < bounds[0] < 0.9


def test_documents_that_agree_completely_or_not_at_all_count_as_one_position_each() -> None:
    bound = lower_bound([100] * 45 + [0] * 5, [100] * 50)
    assert bound == pytest.approx(clopper_pearson(45, 50), abs=0.01)
    assert clopper_pearson(4500, 5000) - bound > 0.05


def test_few_documents_have_a_lower_bound_than_many() -> None:
    bounds = [lower_bound([9900 // count] * count, [10_000 // count] * count) for count in (2, 4, 5, 20, 100)]
    assert bounds == sorted(bounds)
    assert clopper_pearson(9900, 10_000) - bounds[0] > 0.005 > 5e-4 > clopper_pearson(9900, 10_000) - bounds[-1] > 0


@pytest.mark.parametrize(("share", "correlation", "count"), [(0.97, 0.03, 20), (0.99, 0.01, 40), (0.9, 0.1, 15)])
def test_the_bound_holds_for_dependent_positions(share: float, correlation: float, count: int) -> None:
    """For beta-binomial documents the bound is below the true agreement in about 95 % of the samples."""
    generator = np.random.default_rng(7)
    strength = (1 - correlation) / correlation
    held = held_if_independent = 0
    for _ in range(200):
        positions = generator.integers(100, 300, size=count)
        shares = generator.beta(share * strength, (1 - share) * strength, size=count)
        agreed = generator.binomial(positions, shares)
        held += lower_bound(agreed.tolist(), positions.tolist()) <= share
        held_if_independent += clopper_pearson(int(agreed.sum()), int(positions.sum())) <= share
    assert held >= 180
    assert held_if_independent < 170  # what was wrong with the bound for independent positions


def test_the_bound_of_new_documents_holds_for_what_is_measured_on_them() -> None:
    """Half of some documents bound what is measured on the other half in about 95 % of the splits."""
    generator = np.random.default_rng(5)
    held = held_by_all = 0
    for _ in range(300):
        agreed = generator.binomial(200, generator.beta(99, 1, size=40)).tolist()
        positions = [200] * 20
        measured = sum(agreed[20:]) / sum(positions)
        held += lower_bound(agreed[:20], positions, of_new_documents=True) <= measured
        held_by_all += lower_bound(agreed[:20], positions) <= measured
    assert 278 <= held <= 297
    assert held_by_all < held - 8
