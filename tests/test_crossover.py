"""Up to how many positions the sparse head is said to be faster, whatever the clock shows."""

import pytest
import torch
from head_helpers import make_head
from helpers import QUICK, tiny_dense
from test_pipeline import some_windows

from hf_topk.convert import Recipe, convert, pipeline
from hf_topk.measure import crossover
from hf_topk.measure.timing import Spread


@pytest.mark.parametrize(
    ("sparse_seconds", "most"),
    [
        ({1: 1.1}, 0),
        ({1: 0.97}, 0),  # within noise
        ({1: 0.1, 2: 0.5, 4: 0.9, 8: 1.0, 16: 0.1}, 4),
        (dict.fromkeys((1, 2, 4, 8, 16, 32, 64), 0.1), 64),
    ],
)
def test_the_last_size_at_which_sparse_gains_more_than_noise(
    sparse_seconds: dict[int, float], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(runs: object, states: object, positions: int, *_: object) -> dict[str, Spread]:
        return {"dense": Spread(1.0, 0.0, 2.0), "sparse": Spread(sparse_seconds[positions], 0.0, 2.0)}

    monkeypatch.setattr(crossover, "head_seconds", seconds)
    head = make_head()
    assert crossover.fastest_up_to(head, torch.randn(4, head.in_features)) == most


@pytest.mark.parametrize(("chosen", "kept"), [(None, 7), (3, 3)])
def test_a_conversion_measures_it_unless_it_is_chosen(
    chosen: int | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "fastest_up_to", lambda head, states: 7)
    recipe = Recipe(**{**QUICK, "sparse_max_positions": chosen})
    model = convert(tiny_dense(), None, recipe, windows=some_windows()).model
    assert model.config.sparse_max_positions == model.head.sparse_max_positions == kept
