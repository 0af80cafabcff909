"""The faster top-p keeps the tokens of Transformers' sorting version."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_converted, tiny_dense
from transformers import TopPLogitsWarper

from hf_topk.model.logits_processors import SelectingTopPLogitsWarper


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab_size=st.integers(1, 3000),
    spread=st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0]),
    top_p=st.floats(0.01, 0.999),
    least=st.integers(1, 5),
    banned=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 2**16),
)
def test_keeps_the_tokens_of_the_sorting_version(
    rows: int, vocab_size: int, spread: float, top_p: float, least: int, banned: float, seed: int
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(rows, vocab_size) * spread
    scores[torch.rand(rows, vocab_size) < banned] = -torch.inf
    scores[:, seed % vocab_size] = 0.5
    least = min(least, vocab_size)
    kept = SelectingTopPLogitsWarper(top_p, min_tokens_to_keep=least)(None, scores)
    expected = TopPLogitsWarper(top_p, min_tokens_to_keep=least)(None, scores)
    assert kept[kept.isfinite()].equal(scores[kept.isfinite()])
    for row in range(rows):
        ours, theirs = (one[row].isfinite() for one in (kept, expected))
        sums = scores[row].double().softmax(-1).sort().values.cumsum(-1)
        is_near_threshold = bool(((sums - 1 + top_p).abs() < 1e-5).any())
        # Which of equals stays is anyone's choice, and so is the last one where a sum is rounded.
        probabilities = scores[row].double().softmax(-1)
        only_ours, only_theirs = (probabilities[one] for one in (ours & ~theirs, theirs & ~ours))
        threshold = probabilities[theirs].min()
        for only in (only_ours, only_theirs):
            torch.testing.assert_close(only, threshold.expand_as(only), rtol=1e-4, atol=1e-7)
        assert is_near_threshold or least > 1 or len(only_ours) == len(only_theirs)
        assert ours.sum() >= min(least, int(scores[row].isfinite().sum()))


def test_small_examples() -> None:
    scores = torch.tensor([[0.5, 0.05, 0.3, 0.15], [0.97, 0.015, 0.01, 0.005]]).log()
    kept = SelectingTopPLogitsWarper(0.9)(None, scores).isfinite()
    assert kept.tolist() == [[True, False, True, True], [True, False, False, False]]
    assert SelectingTopPLogitsWarper(0.9, min_tokens_to_keep=2)(None, scores).isfinite()[1].sum() == 2


@pytest.mark.parametrize("score", [-torch.inf, torch.inf])
def test_equals_the_sorting_version_for_infinite_scores(score: float) -> None:
    scores = torch.full((2, 50), score)
    assert SelectingTopPLogitsWarper(0.9)(None, scores).shape == TopPLogitsWarper(0.9)(None, scores).shape


@pytest.mark.parametrize("lossless", [False, True])
def test_generate_uses_the_faster_top_p_except_in_lossless_decoding(
    lossless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    call = SelectingTopPLogitsWarper.__call__
    monkeypatch.setattr(
        SelectingTopPLogitsWarper, "__call__", lambda self, *inputs: used.append(1) or call(self, *inputs)
    )
    model = tiny_converted(tiny_dense())
    ids = torch.tensor([[1, 2, 3]])
    model.generate(ids, max_new_tokens=4, do_sample=True, top_p=0.8, top_k=0, lossless=lossless, pad_token_id=0)
    assert bool(used) != lossless
