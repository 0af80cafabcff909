"""Converts dense models: [`convert`] in memory, [`convert_checkpoint`] from folder to folder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hub import Destination
    from .pipeline import convert
    from .recipe import Recipe
    from .report import Report
    from .run import convert_checkpoint

__all__ = ["Destination", "Recipe", "Report", "convert", "convert_checkpoint"]

MODULES = {
    "Destination": "hub",
    "Recipe": "recipe",
    "Report": "report",
    "convert": "pipeline",
    "convert_checkpoint": "run",
}


def __getattr__(name: str) -> Any:
    """Import lazily: the command line needs only the recipe for its help."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{MODULES[name]}", __name__), name)
