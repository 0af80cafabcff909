"""Hidden states of the dense model on sample text, kept on disk as they are made, so that they can be resumed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_topk.model.dense_model import name_of_head
from hf_topk.model.errors import InputError
from hf_topk.progress import Advance, progress
from hf_topk.windows import Window, batches_of

from ..processes import ALONE, Processes


class HiddenStates:
    """The states that enter the head, in one flat file that is mapped into memory, not read.

    A record beside it says how many windows are whole and what they were made from; what lies beyond it, after an
    interruption, is written over.

    Attributes:
        folder: where the file and its record lie.
        windows_done: windows whose states are all on disk.
        positions: N, states on disk.
    """

    def __init__(self, folder: Path, hidden_size: int, dtype: torch.dtype, windows_done: int, positions: int) -> None:
        """Point at a file of states; see [`HiddenStates.open`].

        Args:
            folder: where the file and its record lie.
            hidden_size: d.
            dtype: type of the states.
            windows_done: windows on disk.
            positions: N, states on disk.
        """
        self.folder, self.hidden_size, self.dtype = folder, hidden_size, dtype
        self.windows_done, self.positions = windows_done, positions

    @classmethod
    def open(cls, folder: Path, hidden_size: int, dtype: torch.dtype) -> Self:
        """Open the states of a folder where an earlier conversion left some, or begin with none.

        Args:
            folder: made if it is not there.
            hidden_size: d.
            dtype: type of the states.
        """
        folder.mkdir(parents=True, exist_ok=True)
        record = read_record(folder / "hidden_states.json")
        states = cls(folder, hidden_size, dtype, record.get("windows", 0), record.get("positions", 0))
        is_same_type = record.get("dtype") == str(dtype)  # which type is the faster one may be a close call
        if (
            is_same_type
            and states._file.exists()
            and states._file.stat().st_size >= states.positions * states._bytes_a_state
        ):
            return states
        return cls(folder, hidden_size, dtype, 0, 0)

    @property
    def _file(self) -> Path:
        return self.folder / "hidden_states.bin"

    @property
    def _bytes_a_state(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    def append(self, batches: Iterator[tuple[int, Tensor]]) -> None:
        """Write states as they come, and after each batch how far it is.

        Args:
            batches: pairs of windows done and their states, [n, d].
        """
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.seek(self.positions * self._bytes_a_state)
            file.truncate()
            for windows, states in batches:
                file.write(states.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data)
                file.flush()
                self.windows_done += windows
                self.positions += states.shape[0]
                done = {"windows": self.windows_done, "positions": self.positions, "dtype": str(self.dtype)}
                write_record(self.folder / "hidden_states.json", done)

    def load(self) -> Tensor:
        """All states, [N, d], mapped from disk: only what is touched takes memory."""
        size = self.positions * self.hidden_size
        flat = torch.from_file(str(self._file), shared=False, size=size, dtype=self.dtype)
        return flat.view(self.positions, self.hidden_size)


def collect(
    dense: PreTrainedModel, windows: list[Window], states: HiddenStates, processes: Processes = ALONE
) -> Tensor:
    """Run the dense model over the windows that are not done yet and keep the states that enter its head.

    Args:
        dense: the dense model.
        windows: runs of token ids; each token is one position.
        states: where they are kept; windows that are done are not run again.
        processes: what the batches are dealt out to.

    Returns:
        The states of all windows, [N, d], mapped from disk.

    Raises:
        InputError: when a state is not finite.
    """
    left = windows[states.windows_done :]
    if left:
        total = sum(len(window.token_ids) for window in left)
        with progress("Running the dense model", total, "positions") as advance:
            states.append(_states_of_batches(dense, left, processes, advance))
    return states.load()


def _states_of_batches(
    dense: PreTrainedModel, windows: list[Window], processes: Processes, advance: Advance
) -> Iterator[tuple[int, Tensor]]:
    """Run the dense model batch by batch: numbers of windows and the states of all their positions, [n, d]."""
    batches = list(batches_of(windows))
    results = processes.run(states_of_batch, dense, ((batch,) for batch in batches))
    for batch, states in zip(batches, results, strict=True):
        yield len(batch), states
        advance(states.shape[0])


def states_of_batch(dense: PreTrainedModel, windows: list[Window]) -> Tensor:
    """The states that enter the head at all positions of some windows that are run in one pass.

    Args:
        dense: the dense model.
        windows: runs of token ids; each token is one position.

    Returns:
        States, [n, d], in main memory.

    Raises:
        InputError: when a state is not finite.
    """
    # Padding on the right changes nothing for what stands before it.
    token_ids, real = pad(windows, dense.device)
    with torch.inference_mode(), tapped_head(dense) as tap:
        dense(input_ids=token_ids, use_cache=False)
    states = tap.states[real.to(tap.states.device)]
    if not states.isfinite().all():
        raise InputError("the dense model's hidden states are not finite: check its weights, or load it in bfloat16")
    return states.cpu()


def pad(windows: list[Window], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad windows on the right to one length: token ids [B, T] int64, and which of them are real [B, T] bool."""
    longest = max(len(window.token_ids) for window in windows)
    token_ids = torch.zeros(len(windows), longest, dtype=torch.long)
    real = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        token_ids[row, : len(window.token_ids)] = torch.tensor(window.token_ids)
        real[row, : len(window.token_ids)] = True
    return token_ids.to(device), real.to(device)


class HeadTap(nn.Module):
    """Stands in for a head: keeps what enters it and computes next to nothing.

    Attributes:
        states: what entered last, [B, T, d].
    """

    def __init__(self, head: nn.Linear) -> None:
        """Stand in for `head`, whose weight and bias stay to be seen, since some models ask for their type."""
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.states = torch.empty(0)

    def forward(self, hidden: Tensor) -> Tensor:
        """Keep the hidden states [B, T, d] and return [B, T, 1] of them."""
        self.states = hidden.detach()
        return hidden[..., :1]


@contextmanager
def tapped_head(dense: PreTrainedModel) -> Iterator[HeadTap]:
    """Put a [`HeadTap`] in the place of the dense model's head for a while."""
    name = name_of_head(dense)
    head = cast(nn.Linear, dense.get_submodule(name))
    tap = HeadTap(head)
    dense.set_submodule(name, tap)
    try:
        yield tap
    finally:
        dense.set_submodule(name, head)


def read_record(path: Path) -> dict[str, Any]:
    """Read a small JSON file; empty if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.replace(path)
