"""Makes converted models: see [`convert`] for one in memory, [`convert_checkpoint`] for a folder."""

from .hub import Destination
from .pipeline import convert
from .recipe import Recipe
from .report import Report
from .run import convert_checkpoint

__all__ = ["Destination", "Recipe", "Report", "convert", "convert_checkpoint"]
