"""The processes of a conversion: one, or several that `accelerate launch` starts, of which the first leads.

It deals out calls on the dense model in rounds, one to each process, and takes the results in their order, so that
they do not depend on the number of processes. All else it does alone.
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

PATIENCE = timedelta(days=1)  # of helpers with a first process that reads text; if it ends, they notice


class ProcessEndedError(TopKExpertsError):
    """One of several processes is gone, so that the others cannot go on."""


class Processes:
    """A single process, which does all the work itself."""

    def place(self, device_map: DeviceMap | None) -> DeviceMap | None:
        """The device map to load the dense model with, where `device_map` is asked for."""
        return device_map

    def load(self, source: Source, device_map: DeviceMap | None, dtype: torch.dtype) -> PreTrainedModel:
        """Load the dense model in every process; see [`load_dense`]."""
        return load_dense(source, device_map, dtype)

    def run(
        self, function: Callable[..., Any], dense: PreTrainedModel, arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """Results of `function(dense, *one)` for each of the arguments, in their order.

        Args:
            function: of a module's top level, since it goes to other processes by name.
            dense: the dense model of this process; others use theirs.
            arguments: need not end.

        Raises:
            TopKExpertsError: as the function does, in whichever process.
        """
        for one in arguments:
            yield function(dense, *one)

    def release(self) -> None:
        """Let the other processes end; there is no more work for them."""


ALONE = Processes()


class LaunchedProcesses(Processes):
    """Several processes, seen from the first one."""

    def __init__(self) -> None:
        """Meet the other processes.

        Raises:
            InputError: when accelerate is not installed.
        """
        self._state = _meet()
        self._has_helpers = True

    def place(self, device_map: DeviceMap | None) -> DeviceMap | None:
        """The first process's own device; see [`Processes.place`]."""
        if device_map is not None:
            raise InputError("a device map spreads one process over all devices: leave it out, or launch only one")
        return _place(self._state)

    def load(self, source: Source, device_map: DeviceMap | None, dtype: torch.dtype) -> PreTrainedModel:
        """Load the dense model in all processes at once; see [`Processes.load`]."""
        _broadcast((source, dtype))
        dense, error = _attempt(load_dense, source, device_map, dtype)
        for _, one in _gather((None, error)):
            if one is not None:
                raise one
        return dense

    def run(
        self, function: Callable[..., Any], dense: PreTrainedModel, arguments: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """Deal the calls out; see [`Processes.run`]."""
        left = iter(arguments)
        while calls := list(islice(left, self._state.num_processes)):
            _broadcast((function, calls))
            for result, error in _gather(_attempt(function, dense, *calls[0]))[: len(calls)]:
                if error is not None:
                    raise error
                yield result

    def release(self) -> None:
        """Let the other processes end; see [`Processes.release`]."""
        if self._has_helpers:
            self._has_helpers = False
            _broadcast(None)
            self._state.destroy_process_group()


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that this one, the first, was launched with; they are released at the end.

    Raises:
        InputError: when there are several and accelerate is not installed, or this is not the first.
    """
    if is_helper():
        raise InputError("only the first of several processes converts: call `help_first_process` in the others")
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


def is_helper() -> bool:
    """Whether this process was launched to help another one."""
    return _from_environment("WORLD_SIZE", 1) > 1 and _from_environment("RANK", 0) > 0


def help_first_process() -> None:
    """Do what the first process deals out until it needs no more help. Prints nothing: the first process does.

    Raises:
        InputError: when accelerate is not installed.
        SystemExit: when the first process has ended before its time.
    """
    logging.disable_progress_bar()
    state = _meet()
    try:
        model = _broadcast()
        if model is not None:
            source, dtype = model
            dense, error = _attempt(load_dense, source, _place(state), dtype)
            _gather((None, error))
            while (dealt := _broadcast()) is not None:
                function, calls = dealt
                mine = calls[state.process_index :][:1]
                _gather(_attempt(function, dense, *mine[0]) if mine else (None, None))
    except (ProcessEndedError, KeyboardInterrupt):
        sys.exit(1)
    state.destroy_process_group()


def _meet() -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError("several processes need accelerate: pip install 'hf-topk[accelerate]'") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    is_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or accelerator in (None, torch.device("mps"))
    return PartialState(cpu=is_cpu, timeout=PATIENCE)


def _place(state: Any) -> DeviceMap | None:
    return None if state.device.type == "cpu" else {"": state.device}


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, TopKExpertsError | None]:
    """What a function returns, or the error that is for the first process to print."""
    try:
        return function(*arguments), None
    except TopKExpertsError as error:
        return None, error


def _broadcast(value: Any = None) -> Any:
    """The first process's value, in every process."""
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
            "another process of the conversion has ended; mend what it says, and run the same command with --resume"
        ) from error


def _from_environment(name: str, default: int) -> int:
    """A number that launchers set."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default
