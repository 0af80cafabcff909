"""Makes converted models: see [`convert`] for one in memory, [`convert_checkpoint`] for a folder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hub import Destination
    from .pipeline import convert
    from .recipe import Recipe
    from .report import Report
    from .run import convert_checkpoint

__all__ = ["Destination", "Recipe", "Report", "convert", "convert_checkpoint"]

PLACES = {
    "Destination": "hub",
    "Recipe": "recipe",
    "Report": "report",
    "convert": "pipeline",
    "convert_checkpoint": "run",
}


def __getattr__(name: str) -> Any:
    """Import when it is first used: the command line needs the recipe alone to say what there is to choose."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{PLACES[name]}", __name__), name)
