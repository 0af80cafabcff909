"""The certified screen finds the dense head's likeliest tokens, whatever rows and hidden states are."""

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import make_head
from support.lossless import NEW_TOKENS, SAMPLED, convert, draft_everywhere, generate, stats_of
from support.tiny_models import tiny_dense
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessorList

from hf_topk import TopKExpertsForCausalLM, TopKExpertsHead
from hf_topk.model import certified_screen
from hf_topk.model.certified_screen import CertifiedScreen, can_certify, greedy_logits_of
from hf_topk.model.drafting import verification

is_faster = certified_screen._is_faster
pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no FBGEMM on this machine"
)


@pytest.fixture(autouse=True)
def is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the screen however small the head is."""
    monkeypatch.setattr(certified_screen, "_is_faster", lambda *_: True)
    monkeypatch.setattr(certified_screen, "MOST_CANDIDATES", 1.0)


def rows_and_states(
    seed: int, tokens: int, size: int, positions: int, spread: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of unequal lengths, some of them equal, and hidden states along some of them with an outlier."""
    torch.manual_seed(seed)
    rows = torch.randn(tokens, size) * torch.exp(spread * torch.randn(tokens, 1))
    rows[tokens // 2 :: 3] = rows[: len(rows[tokens // 2 :: 3])].clone()
    hidden = rows[torch.randint(tokens, (positions,))] + torch.randn(positions, size)
    hidden[:, seed % size] *= 1 + 10 * spread
    scale = 0.01 if dtype == torch.float16 else 1.0  # so that logits are finite
    return (scale * rows).to(dtype), (scale * hidden).to(dtype)


def products(hidden: Tensor, rows: Tensor) -> Tensor:
    return (hidden.double() @ rows.double().t()).float()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.sampled_from([1, 7, 64, 999]),
    size=st.sampled_from([1, 5, 32, 130]),
    positions=st.sampled_from([1, 3, 8, 19]),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_every_token_that_could_be_the_likeliest_has_its_exact_logit(
    seed: int, tokens: int, size: int, positions: int, spread: float, dtype: torch.dtype
) -> None:
    rows, hidden = rows_and_states(seed, tokens, size, positions, spread, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certified_screen, "MOST_CANDIDATES", 1.0)
        logits, is_unproven = CertifiedScreen.of(rows).logits(hidden)
    expected = products(hidden, rows)
    assert not is_unproven.any()
    assert logits.dtype == dtype
    ruled_out, type_ = logits.isneginf(), torch.finfo(dtype)
    lengths = hidden.float().norm(dim=-1, keepdim=True) * rows.float().norm(dim=-1)
    rounded = type_.eps * expected.abs().clamp_min(type_.tiny) + 1e-5 * lengths
    assert (ruled_out | ((logits.float() - expected).abs() <= rounded)).all()
    # Two tokens within a rounding step of each other may change places in the dense head, so both are needed.
    most = expected.amax(dim=-1, keepdim=True)
    assert not (ruled_out & (expected >= most - type_.eps * most.abs())).any()


def test_most_tokens_are_ruled_out() -> None:
    rows, hidden = rows_and_states(0, 5000, 128, 16, 0.3, torch.bfloat16)
    logits, is_unproven = CertifiedScreen.of(rows).logits(hidden)
    assert not is_unproven.any()
    assert logits.isfinite().sum(dim=-1).float().mean() < 100


@pytest.mark.parametrize("broken", ["errors", "norms"])
def test_the_bound_is_needed(broken: str) -> None:
    """Without either part of the bound, tokens are missed."""
    torch.manual_seed(0)
    rows, hidden = torch.randn(400, 24), torch.randn(5000, 24)
    if broken == "norms":
        rows, hidden[:, 0] = (127 * rows / rows.abs().amax(dim=-1, keepdim=True)).round(), 50.0  # a coarse step
        rows[:, 0] = 127.0  # so that rows have no error
    screen = CertifiedScreen.of(rows)
    without = CertifiedScreen(**{**vars(screen), broken: torch.zeros(400), f"largest_{broken[:-1]}": 0.0})
    expected = products(hidden, rows).argmax(dim=-1)
    found = [one.logits(hidden) for one in (screen, without)]
    is_right, is_right_without = ((logits.argmax(dim=-1) == expected) | is_unproven for logits, is_unproven in found)
    assert is_right.all()
    assert not is_right_without.all()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_products_do_not_overflow(sign: float) -> None:
    """In kernels that add two products in 16 bits."""
    rows = torch.full((40, 64), sign)
    rows[3] *= 1.001
    logits, _ = CertifiedScreen.of(rows).logits(torch.full((8, 64), sign))
    torch.testing.assert_close(logits[:, 3], torch.full((8,), 64.064))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_rows_are_left_as_they_are(dtype: torch.dtype) -> None:
    rows, hidden = rows_and_states(1, 50, 16, 3, 0.5, dtype)
    rows_before, hidden_before = rows.clone(), hidden.clone()
    CertifiedScreen.of(rows).logits(hidden)
    assert rows.equal(rows_before)
    assert hidden.equal(hidden_before)


def test_packing_warns_of_nothing_and_leaves_the_engine() -> None:
    before = torch.backends.quantized.engine
    torch.set_warn_always(True)  # not once a process
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            CertifiedScreen.of(torch.randn(5, 8))
    finally:
        torch.set_warn_always(False)
    assert torch.backends.quantized.engine == before


def plain_head(rows: Tensor) -> TopKExpertsHead:
    """The head of a model with these rows, as many as it has."""
    head = copy.deepcopy(make_head())
    head.weight = nn.Parameter(rows[: head.out_features, : head.in_features].clone(), requires_grad=False)
    return head


@pytest.mark.parametrize(
    "change",
    [
        lambda rows, hidden: hidden.zero_(),  # all logits are equal
        lambda rows, hidden: hidden.fill_(torch.nan),
        lambda rows, hidden: hidden[1].fill_(torch.nan),
        lambda rows, hidden: hidden[0, 0].fill_(torch.inf),
        lambda rows, hidden: rows[4].fill_(torch.nan),
        lambda rows, hidden: rows[4, 2].fill_(torch.inf),
    ],
)
def test_dense_logits_where_nothing_can_be_proven(
    change: Callable[[Tensor, Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certified_screen, "MOST_CANDIDATES", 0.5)
    rows, hidden = rows_and_states(2, 2000, 64, 3, 0.1, torch.float32)
    head = plain_head(rows)
    weight, hidden = head.weight.detach(), hidden[:, : head.in_features].clone()
    change(weight, hidden)
    dense, found = head.fastest_dense_logits(hidden), greedy_logits_of(head)(hidden)
    is_dense = found.isclose(dense, equal_nan=True).all(dim=-1)
    assert is_dense.any()
    assert found[~is_dense].argmax(dim=-1).equal(dense[~is_dense].argmax(dim=-1))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.detach().neg_(),
        lambda weight: weight.data.neg_(),  # which torch does not count as a change
        lambda weight: weight.data[3:5].copy_(weight.data[[4, 3]]),
        lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    ],
)
def test_a_changed_weight_gets_a_new_screen(change: Callable[[Tensor], Any]) -> None:
    head = plain_head(torch.randn(2000, 64))
    hidden = head.weight[3:5] * 3  # both are the likeliest at one position
    for _ in range(2):
        found = greedy_logits_of(head)(hidden)
        assert found.argmax(dim=-1).equal(F.linear(hidden, head.weight).argmax(dim=-1))
        assert found.isneginf().any()
        change(head.weight)


def test_an_unchanged_weight_keeps_its_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    head = plain_head(torch.randn(2000, 64))
    greedy_logits_of(head)(head.weight[:2])
    monkeypatch.setattr(CertifiedScreen, "of", None)
    greedy_logits_of(head)(head.weight[:2])


def test_a_weight_that_cannot_be_certified_any_more_loses_its_screen() -> None:
    head = plain_head(torch.randn(2000, 64))
    greedy_logits_of(head)(head.weight[:2])
    head.double()
    greedy_logits_of(head)
    assert certified_screen._screens.get(head.weight) is None


def test_a_screen_goes_with_its_weight() -> None:
    head = plain_head(torch.randn(2000, 64))
    gc.collect()
    count = len(certified_screen._screens)
    greedy_logits_of(head)(torch.randn(2, head.in_features))
    assert len(certified_screen._screens) == count + 1
    del head
    gc.collect()
    assert len(certified_screen._screens) == count


def test_heads_without_a_screen() -> None:
    assert can_certify(make_head())
    assert not can_certify(make_head(bias=True))
    assert not can_certify(copy.deepcopy(make_head()).double())
    assert not can_certify(copy.deepcopy(make_head()).to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_certify(make_head())


def test_head_mode_dense_has_no_screen() -> None:
    head = make_head(head_mode="dense")
    assert verification(head, LogitsProcessorList(), GenerationConfig()) == head.fastest_dense_logits


@pytest.mark.parametrize(("positions", "size"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (64, 32), (65, None)])
@pytest.mark.parametrize("slower", [None, 8, 16, 32])
def test_where_it_is_measured_to_be_faster(
    positions: int, size: int | None, slower: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certified_screen, "_is_faster", is_faster)

    def measured(*arguments: Any) -> bool:
        return 1 << (arguments[3] - 1).bit_length() != slower

    monkeypatch.setattr(certified_screen, "is_faster", measured)
    head = plain_head(torch.randn(2000, 64))
    found = greedy_logits_of(head)(torch.randn(positions, head.in_features))
    assert found.isneginf().any() == (size is not None and slower not in (8, size))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of each verification pass by a screen."""
    draft_everywhere(monkeypatch)
    found: list[int] = []
    logits = CertifiedScreen.logits

    def counting(screen: CertifiedScreen, hidden: Tensor) -> tuple[Tensor, Tensor]:
        found.append(len(hidden))
        return logits(screen, hidden)

    monkeypatch.setattr(CertifiedScreen, "logits", counting)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choices", [{}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}])
def test_greedy_tokens_are_the_dense_ones(dtype: torch.dtype, choices: dict[str, Any], used: list[int]) -> None:
    dense = tiny_dense(tied=False).to(dtype)
    model = convert(dense)
    expected = generate(dense, **choices)
    assert generate(model, **choices, lossless=True).equal(expected)
    assert sum(used) == 2 * (stats_of(model).forward_passes - 1)  # two rows, and prefill by the dense head
    assert stats_of(model).accepted > 0


@pytest.mark.parametrize(
    "choices",
    [
        SAMPLED,
        {"repetition_penalty": 1.7},
        {"return_dict_in_generate": True, "output_scores": True},
        {"return_dict_in_generate": True, "output_logits": True},
        {"num_beams": 2},
    ],
)
def test_not_where_other_logits_count(choices: dict[str, Any], used: list[int]) -> None:
    dense = tiny_dense(tied=False)
    found, expected = generate(convert(dense), **choices, lossless=True), generate(dense, **choices)
    assert getattr(found, "sequences", found).equal(getattr(expected, "sequences", expected))
    assert not used


def test_not_where_the_model_caps_its_logits(used: list[int]) -> None:
    """By a cap so low that it makes many logits equal."""
    dense = tiny_dense("gemma2", tied=False, head_dim=8, final_logit_softcapping=1e-3).to(torch.bfloat16)
    model: TopKExpertsForCausalLM = convert(dense)
    assert generate(model, lossless=True).equal(generate(dense))
    assert stats_of(model).tokens == NEW_TOKENS
    assert not used
    assert verification(model.head, LogitsProcessorList(), model.generation_config) == model.head.fastest_dense_logits


def test_not_without_a_cache(used: list[int]) -> None:
    dense, choices = tiny_dense(tied=False), {"use_cache": False}
    assert generate(convert(dense), **choices, lossless=True).equal(generate(dense, **choices))
    assert not used
