"""Output of the commands: only results go to standard output."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def quiet() -> None:
    """Silence Transformers, accelerate and the Hub's client; no progress bars in files."""
    import logging

    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def print_json(value: dict[str, Any]) -> None:
    """Print a result as JSON on standard output.

    Args:
        value: the result.
    """
    print(as_json(value))


def print_table(title: str, rows: dict[str, str]) -> None:
    """Print a result for people: a table on a terminal, plain lines elsewhere.

    Args:
        title: of the table.
        rows: values by name.
    """
    if not sys.stdout.isatty():
        print(title)
        print("\n".join(f"{name}: {value}" for name, value in rows.items()))
        return
    _print_rich(title, (), rows.items())


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of several columns for people: as [`print_table`] elsewhere, but with tabs between cells.

    Args:
        title: of the table.
        columns: their names.
        rows: cells.
    """
    if not sys.stdout.isatty():
        print(title)
        print("\n".join("\t".join(row) for row in (columns, *rows)))
        return
    _print_rich(title, columns, rows)


def _print_rich(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", show_header=bool(columns))
    for row in rows:
        table.add_row(*map(Text, row))  # no markup: tokens may have brackets
    Console().print(table)


def as_json(metrics: dict[str, Any]) -> str:
    """Format metrics as a JSON object, with null for floats that are not finite.

    Args:
        metrics: values by name; nested values must be finite.
    """
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    return json.dumps(finite, indent=2, allow_nan=False)
