"""Held-out documents: the split, and what the dense head says of them."""

from collections import Counter

import pytest
import torch
from support.tiny_models import VOCAB_SIZE, tiny_converted
from torch.nn import functional as F

from hf_topk.convert.steps.held_out import DenseArgmax, dense_argmax, split_by_document
from hf_topk.evaluation.confidence_bound import lower_bound
from hf_topk.model.errors import InputError
from hf_topk.windows import Window


def some_windows() -> list[Window]:
    """Windows of three documents, two of them of one kind."""
    generator = torch.Generator().manual_seed(3)
    return [
        Window(document, tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()), kind=kind)
        for document, length, kind in ((5, 2, "prose/a"), (5, 17, "prose/a"), (0, 40, "code"), (2, 33, "prose/b"))
    ]


def random_argmax(positions: int = 400) -> DenseArgmax:
    generator = torch.Generator().manual_seed(8)
    states, numbers = torch.randn(positions, 32, generator=generator), torch.arange(positions)
    best = torch.randint(VOCAB_SIZE, (positions,), generator=generator)
    return DenseArgmax(states, best, numbers % 10, numbers % 2, ("prose", "code"))


def test_no_document_is_in_both_parts() -> None:
    windows = [Window(number // 3, (1, 2)) for number in range(30)]
    distil_on, held_out = split_by_document(windows, 0.2, 0)
    assert len({window.document for window in held_out}) == 3
    assert not {window.document for window in held_out} & {window.document for window in distil_on}
    assert sorted([*distil_on, *held_out], key=lambda window: window.document) == windows


def test_a_share_of_each_kind_is_held_out() -> None:
    kinds = ["prose"] * 10 + ["code"] * 5 + ["chat"]
    windows = [Window(number, (1, 2), kind=kind) for number, kind in enumerate(kinds)]
    _, held_out = split_by_document(windows, 0.4, 0)
    assert Counter(window.kind for window in held_out) == {"prose": 4, "code": 2}
    languages = ["languages/de"] * 3 + ["languages/ko"] + ["languages/hi"] * 2
    windows = [Window(number, (1, 2), kind=kind) for number, kind in enumerate(languages)]
    assert Counter(window.kind for window in split_by_document(windows, 0.2, 0)[1]) == {
        "languages/de": 1,
        "languages/hi": 1,
    }
    alone = [Window(number, (1, 2), kind=str(number)) for number in range(3)]
    assert len(split_by_document(alone, 0.4, 0)[1]) == 1


@pytest.mark.parametrize(("documents", "held_out"), [(2, 1), (3, 1), (5, 1), (9, 3), (12, 4), (29, 4), (60, 6)])
def test_at_least_four_documents_or_a_third_are_held_out(documents: int, held_out: int) -> None:
    windows = [Window(number, (1, 2)) for number in range(documents)]
    assert len(split_by_document(windows, 0.1, 0)[1]) == held_out


@pytest.mark.parametrize("held_out", [0.001, 0.5, 0.999])
def test_neither_part_of_a_split_is_empty(held_out: float) -> None:
    for documents in (1, 2, 5):
        windows = [Window(number % documents, (1, 2)) for number in range(10)]
        distil_on, rest = split_by_document(windows, held_out, 0)
        assert 0 < len(distil_on) == 10 - len(rest) < 10
    with pytest.raises(InputError, match="only one window"):
        split_by_document([Window(0, (1, 2))], held_out, 0)


def test_the_dense_argmax_is_that_of_each_window() -> None:
    model, windows = tiny_converted(), some_windows()
    dense = dense_argmax(model, windows)
    states, best = [], []
    with torch.no_grad():
        for window in windows:
            states.append(model.base.model(torch.tensor([window.token_ids])).last_hidden_state[0])
            best.append(F.linear(states[-1], model.head.weight).argmax(dim=-1))
    torch.testing.assert_close(dense.states, torch.cat(states))
    assert torch.equal(dense.best, torch.cat(best))
    assert dense.documents.tolist() == [0] * 19 + [1] * 40 + [2] * 33
    assert dense.kinds.tolist() == [0] * 19 + [1] * 40 + [0] * 33
    assert dense.kind_names == ("prose", "code")


@pytest.mark.parametrize("lost", [[], [0, 1, 2], [1, 3, 5]])
def test_the_target_is_reached_on_the_worst_kind_and_by_the_bound(lost: list[int]) -> None:
    dense = random_argmax(400)
    agrees = ~torch.isin(torch.arange(400), torch.tensor(lost))
    by_document = [int(agrees[dense.documents == document].sum()) for document in range(10)]
    assert dense.bound(agrees) == lower_bound(by_document, [40] * 10, of_new_documents=True)
    all_text = float(agrees.double().mean())
    worst = min(float(some.double().mean()) for some in (agrees[0::2], agrees[1::2]))
    assert dense.agreement(agrees) == pytest.approx((200 * worst + 400 * all_text) / 600)
    assert dense.reached(agrees) == min(dense.bound(agrees), dense.agreement(agrees))
    if lost:
        assert worst < dense.agreement(agrees) < all_text


@pytest.mark.parametrize(("count", "named"), [(390, []), (400, ["prose", "code"])])
def test_agreement_is_named_for_kinds_of_200_positions(count: int, named: list[str]) -> None:
    assert list(random_argmax(count).by_kind(torch.ones(count, dtype=torch.bool))) == named


@pytest.mark.parametrize(("count", "left"), [(400, 400), (399, 200), (130, 100), (1, 1)])
def test_a_subset_of_positions_is_evenly_spaced(count: int, left: int) -> None:
    dense = random_argmax()
    some = dense.evenly_spaced(count)
    step = 400 // left
    assert torch.equal(some.states, dense.states[::step])
    assert torch.equal(some.best, dense.best[::step])
    assert torch.equal(some.documents, dense.documents[::step].unique(return_inverse=True)[1])  # counted anew
