"""Hidden states of the dense model on the calibration text, written batch by batch, so that a run can resume."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_topk.model.dense_model import name_of_head
from hf_topk.model.errors import InputError
from hf_topk.progress import Advance, progress
from hf_topk.targets import inputs_of
from hf_topk.windows import Window, batches_of

from ..processes import ALONE, Processes


class HiddenStates:
    """The inputs of the head, in one flat memory-mapped file.

    A record beside the file counts the complete windows. After an interruption, bytes beyond them are overwritten.

    Attributes:
        folder: of the file and its record.
        windows_done: windows whose states are all on disk.
        positions: N, states on disk.
    """

    def __init__(self, folder: Path, hidden_size: int, dtype: torch.dtype, windows_done: int, positions: int) -> None:
        """Refer to a file of states; see [`HiddenStates.open`].

        Args:
            folder: of the file and its record.
            hidden_size: d.
            dtype: of the states.
            windows_done: windows on disk.
            positions: N, states on disk.
        """
        self.folder, self.hidden_size, self.dtype = folder, hidden_size, dtype
        self.windows_done, self.positions = windows_done, positions

    @classmethod
    def open(cls, folder: Path, hidden_size: int, dtype: torch.dtype) -> Self:
        """Open the states that an interrupted conversion left in a folder, or start with none.

        Args:
            folder: created if missing.
            hidden_size: d.
            dtype: of the states; states of another dtype are not used.
        """
        folder.mkdir(parents=True, exist_ok=True)
        record = read_record(folder / "hidden_states.json")
        states = cls(folder, hidden_size, dtype, record.get("windows", 0), record.get("positions", 0))
        is_same_dtype = record.get("dtype") == str(dtype)  # the faster dtype is measured, and can change between runs
        if (
            is_same_dtype
            and states._file.exists()
            and states._file.stat().st_size >= states.positions * states._bytes_per_state
        ):
            return states
        return cls(folder, hidden_size, dtype, 0, 0)

    @property
    def _file(self) -> Path:
        return self.folder / "hidden_states.bin"

    @property
    def _bytes_per_state(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    def append(self, batches: Iterator[tuple[int, Tensor]]) -> None:
        """Write states batch by batch, and update the record after each.

        Args:
            batches: pairs of a number of windows and their states, [n, d].
        """
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.seek(self.positions * self._bytes_per_state)
            file.truncate()
            for windows, states in batches:
                file.write(states.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data)
                file.flush()
                self.windows_done += windows
                self.positions += states.shape[0]
                done = {"windows": self.windows_done, "positions": self.positions, "dtype": str(self.dtype)}
                write_record(self.folder / "hidden_states.json", done)

    def load(self) -> Tensor:
        """All states, [N, d], memory-mapped: only pages that are read take RAM."""
        size = self.positions * self.hidden_size
        flat = torch.from_file(str(self._file), shared=False, size=size, dtype=self.dtype)
        return flat.view(self.positions, self.hidden_size)


def collect(
    dense: PreTrainedModel, windows: list[Window], states: HiddenStates, processes: Processes = ALONE
) -> Tensor:
    """Run the dense model over the remaining windows and store the inputs of its head.

    Args:
        dense: the dense model.
        windows: token ids; each token is one position.
        states: where they are stored; windows that it has are not run again.
        processes: that share the batches.

    Returns:
        The states of all windows, [N, d], memory-mapped.

    Raises:
        InputError: when a state is not finite.
    """
    left = windows[states.windows_done :]
    if left:
        total = sum(window.positions for window in left)
        with progress("Running the dense model", total, "positions") as advance:
            states.append(_states_of_batches(dense, left, processes, advance))
    return states.load()


def _states_of_batches(
    dense: PreTrainedModel, windows: list[Window], processes: Processes, advance: Advance
) -> Iterator[tuple[int, Tensor]]:
    """Run the dense model batch by batch; yield the number of windows of each batch and its states, [n, d]."""
    batches = list(batches_of(windows))
    results = processes.run(states_of_batch, dense, ((batch,) for batch in batches))
    for batch, states in zip(batches, results, strict=True):
        yield len(batch), states
        advance(states.shape[0])


def states_of_batch(dense: PreTrainedModel, windows: list[Window]) -> Tensor:
    """The inputs of the head at all positions of some windows, from one forward pass.

    Args:
        dense: the dense model.
        windows: token ids; each token is one position.

    Returns:
        States, [n, d], in RAM.

    Raises:
        InputError: when a state is not finite.
    """
    # The model is causal, so padding on the right needs no attention mask.
    inputs, real = inputs_of(windows, dense)
    with torch.inference_mode(), recorded_head_input(dense) as head_input:
        dense(**inputs, use_cache=False)
    states = head_input.states[real.to(head_input.states.device)]
    if not states.isfinite().all():
        raise InputError("the dense model's hidden states are not finite: check its weights, or load it in bfloat16")
    return states.cpu()


@dataclass
class HeadInput:
    """What enters a head.

    Attributes:
        states: the last input, [B, T, d]; empty before the first.
    """

    states: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def recorded_head_input(dense: PreTrainedModel) -> Iterator[HeadInput]:
    """Inside the context, record the input of the dense model's head, and compute logits of the first position only.

    Args:
        dense: the dense model.
    """
    recorded = HeadInput()

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        recorded.states = inputs[0].detach()
        return (inputs[0][:, :1],)

    hook = dense.get_submodule(name_of_head(dense)).register_forward_pre_hook(record)
    try:
        yield recorded
    finally:
        hook.remove()


def read_record(path: Path) -> dict[str, Any]:
    """Read a small JSON file; an empty record if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(path)
