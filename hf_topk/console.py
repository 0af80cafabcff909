"""Output of the commands: only results go to standard output."""

import json
import math
import sys
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
    from rich.console import Console
    from rich.table import Table

    if not sys.stdout.isatty():
        print(title)
        print("\n".join(f"{name}: {value}" for name, value in rows.items()))
        return
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
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
