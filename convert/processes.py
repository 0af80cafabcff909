"""The processes of a conversion: one, or a main process and workers that `accelerate launch` starts.

The main process distributes calls on the dense model in rounds, one per process, and takes the results in order, so
they do not depend on the number of processes. It does everything else alone.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_topk.model.errors import InputError, TopKExpertsError

from .load_dense import DeviceMap, load_dense
from .source import Source

TIMEOUT = timedelta(days=1)  # of workers, while the main process reads text; they notice at once if it ends


class ProcessEndedError(TopKExpertsError):
    """Another process of the conversion has ended, so this one cannot go on."""


class Processes:
    """A single process, which does all the work."""

    def place(self, device_map: DeviceMap | None) -> DeviceMap | None:
        """The device map to load the dense model with, given the user's."""
        return device_map

    def load(self, source: Source, device_map: DeviceMap | None, dtype: torch.dtype) -> PreTrainedModel:
        """Load the dense model in every process; see [`load_dense`]."""
        return load_dense(source, device_map, dtype)

    def run(
        self, function: Callable[..., Any], dense: PreTrainedModel, arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """Yield `function(dense, *one)` for each of the arguments, in order.

        Args:
            function: at the top level of a module, as it is pickled by name.
            dense: the dense model of this process; workers use their own.
            arguments: of the calls; read lazily.

        Raises:
            TopKExpertsError: when the function raises it, in any process.
        """
        for one in arguments:
            yield function(dense, *one)

    def release(self) -> None:
        """Let the workers end."""


ALONE = Processes()


class LaunchedProcesses(Processes):
    """The main process, with workers."""

    def __init__(self) -> None:
        """Connect to the workers.

        Raises:
            InputError: when accelerate is not installed.
        """
        self._state = _connect()
        self._has_workers = True

    def place(self, device_map: DeviceMap | None) -> DeviceMap | None:
        """The main process's own device; see [`Processes.place`]."""
        if device_map is not None:
            raise InputError(
                "--device-map spreads one process over all devices: leave it out, or launch a single process"
            )
        return _place(self._state)

    def load(self, source: Source, device_map: DeviceMap | None, dtype: torch.dtype) -> PreTrainedModel:
        """Load the dense model in all processes in parallel; see [`Processes.load`]."""
        _broadcast((source, dtype))
        dense, error = _attempt(load_dense, source, device_map, dtype)
        for _, one in _gather((None, error)):
            if one is not None:
                raise one
        return dense

    def run(
        self, function: Callable[..., Any], dense: PreTrainedModel, arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """Distribute the calls; see [`Processes.run`]."""
        left = iter(arguments)
        while calls := list(islice(left, self._state.num_processes)):
            _broadcast((function, calls))
            for result, error in _gather(_attempt(function, dense, *calls[0]))[: len(calls)]:
                if error is not None:
                    raise error
                yield result

    def release(self) -> None:
        """Let the workers end; see [`Processes.release`]."""
        if self._has_workers:
            self._has_workers = False
            _broadcast(None)
            self._state.destroy_process_group()


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes of this conversion, from the main process; workers are released at the end.

    Raises:
        InputError: when there are workers and accelerate is not installed, or this process is a worker.
    """
    if is_worker():
        raise InputError("only the main process converts: call `run_worker` in the others")
    if _from_environment("WORLD_SIZE", 1) == 1:
        yield ALONE
        return
    processes = LaunchedProcesses()
    try:
        yield processes
    except ProcessEndedError:
        raise
    except TopKExpertsError:
        processes.release()
        raise
    processes.release()


def is_worker() -> bool:
    """Whether this process is a worker."""
    return _from_environment("WORLD_SIZE", 1) > 1 and _from_environment("RANK", 0) > 0


def run_worker() -> None:
    """Run the calls that the main process sends, until it releases this worker. Only the main process prints.

    Raises:
        InputError: when accelerate is not installed.
        SystemExit: when another process ends early.
    """
    logging.disable_progress_bar()
    state = _connect()
    try:
        model = _broadcast()
        if model is not None:
            source, dtype = model
            dense, error = _attempt(load_dense, source, _place(state), dtype)
            _gather((None, error))
            while (sent := _broadcast()) is not None:
                function, calls = sent
                mine = calls[state.process_index :][:1]
                _gather(_attempt(function, dense, *mine[0]) if mine else (None, None))
    except (ProcessEndedError, KeyboardInterrupt):
        sys.exit(1)
    state.destroy_process_group()


def _connect() -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError("several processes need accelerate: pip install 'hf-topk[accelerate]'") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    is_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or accelerator in (None, torch.device("mps"))
    return PartialState(cpu=is_cpu, timeout=TIMEOUT)


def _place(state: Any) -> DeviceMap | None:
    return None if state.device.type == "cpu" else {"": state.device}


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, TopKExpertsError | None]:
    """A function's result, or the error for the main process to print."""
    try:
        return function(*arguments), None
    except TopKExpertsError as error:
        return None, error


def _broadcast(value: Any = None) -> Any:
    """The main process's value, in every process."""
    from accelerate.utils import broadcast_object_list

    with _noticing_an_end():
        return broadcast_object_list([value])[0]


def _gather(outcome: Any) -> list[Any]:
    """The outcomes of all processes, in every process."""
    from accelerate.utils import gather_object

    with _noticing_an_end():
        return gather_object([outcome])


@contextmanager
def _noticing_an_end() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of torch.distributed
        raise ProcessEndedError(
            "another process of the conversion failed: fix the error that it printed, then run this with --resume"
        ) from error


def _from_environment(name: str, default: int) -> int:
    """A number that the launcher sets."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
