"""Hidden states of the dense model: the inputs of its head, stored on disk."""

import itertools
from pathlib import Path

import pytest
import torch
from support.tiny_models import (
    some_windows,
    tiny_dense,
)
from torch import Tensor

from hf_topk.convert.steps.hidden_states import HiddenStates, collect
from hf_topk.windows import batches_of


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_hidden_states_are_the_inputs_of_the_head(model_type: str, tmp_path: Path) -> None:
    dense, windows = tiny_dense(model_type), some_windows()
    head = dense.get_output_embeddings()
    entered: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0][0]))
    with torch.inference_mode():
        for window in windows:
            dense(torch.tensor([window.token_ids]))
    hook.remove()
    states = collect(dense, windows, HiddenStates.open(tmp_path, 32, dense.dtype))
    torch.testing.assert_close(states, torch.cat(entered))
    assert dense.get_output_embeddings() is head


def test_hidden_states_survive_on_disk(tmp_path: Path) -> None:
    dense, windows = tiny_dense(), some_windows()
    states = collect(dense, windows, HiddenStates.open(tmp_path, 32, dense.dtype)).clone()
    again = HiddenStates.open(tmp_path, 32, dense.dtype)
    assert (again.windows_done, again.positions) == (len(windows), len(states))
    assert torch.equal(again.load(), states)


def test_batches_hold_every_window_in_order() -> None:
    windows = some_windows()
    batches = list(batches_of(windows, positions=100))
    assert list(itertools.chain(*batches)) == windows
    assert all(len(batch) * len(batch[0].token_ids) <= 100 for batch in batches)
    assert [len(batch) for batch in batches_of(windows, positions=1)] == [1] * len(windows)
