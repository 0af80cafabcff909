"""Progress of long steps, on stderr: a live bar on a terminal, plain lines from time to time elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

SECONDS_BETWEEN_PLAIN_LINES = 10.0
SECONDS_BEFORE_PROGRESS = 2.0  # for steps that are short on most inputs


class Advance(Protocol):
    """Reports that `amount` more units of a step are done."""

    def __call__(self, amount: int = 1) -> None: ...  # noqa: D102


@contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Show the progress of a step of `total` units, with its rate and the time left.

    Args:
        description: of the step, in a few words.
        total: units in the step.
        unit: the name of a unit, in the plural.

    Yields:
        A function to call with the number of units done since its last call.
    """
    show = _live_bar if sys.stderr.isatty() else _plain_lines
    with show(description, total, unit) as advance:
        yield advance


@contextmanager
def progress_once_slow(description: str, total: int, unit: str) -> Iterator[Advance]:
    """As [`progress`], but only if the step takes longer than `SECONDS_BEFORE_PROGRESS`.

    Args:
        description: of the step, in a few words.
        total: units in the step.
        unit: the name of a unit, in the plural.

    Yields:
        A function to call with the number of units done since its last call.
    """
    started = time.monotonic()
    done = 0
    shown: Advance | None = None
    with ExitStack() as stack:

        def advance(amount: int = 1) -> None:
            nonlocal done, shown
            done += amount
            if shown is not None:
                shown(amount)
            elif time.monotonic() - started > SECONDS_BEFORE_PROGRESS:
                shown = stack.enter_context(progress(description, total, unit))
                shown(done)

        yield advance


@contextmanager
def _live_bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, rate="")
        done = 0

        def advance(amount: int = 1) -> None:
            nonlocal done
            done += amount
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=done, rate=f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s")

        yield advance


@contextmanager
def _plain_lines(description: str, total: int, unit: str) -> Iterator[Advance]:
    started = last_line = time.monotonic()
    done = 0

    def advance(amount: int = 1) -> None:
        nonlocal done, last_line
        done += amount
        now = time.monotonic()
        if now - last_line < SECONDS_BETWEEN_PLAIN_LINES:
            return
        last_line = now
        rate = done / (now - started)
        left = max(total - done, 0) / rate if rate else float("inf")
        print(f"{description}: {done:,}/{total:,} {unit}, {rate:,.1f}/s, {left:,.0f} s left", file=sys.stderr)

    yield advance
    print(f"{description}: {done:,} {unit} in {time.monotonic() - started:.1f} s", file=sys.stderr)
