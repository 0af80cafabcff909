"""What commands print: results on standard output, and nothing else there."""

import json
import math
import sys
from typing import Any


def quiet() -> None:
    """Keep the notes of Transformers, accelerate and the Hub's client off the screen, and bars out of files."""
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
        value: figures by name.
    """
    print(as_json(value))


def print_table(title: str, rows: dict[str, str]) -> None:
    """Print a result for people: a table on a terminal, plain lines elsewhere.

    Args:
        title: what it is of.
        rows: what stands in it, by name.
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


def as_json(figures: dict[str, Any]) -> str:
    """Write figures as a JSON object, with null for what is not finite.

    Args:
        figures: values by name; what they hold in turn is finite.
    """
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }
    return json.dumps(finite, indent=2, allow_nan=False)
