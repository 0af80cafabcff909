"""Axes of plots: scales from values to pixels, and round numbers to label."""

import math
from dataclasses import dataclass

TICKS = 5


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly.

    Attributes:
        low: the value at the first pixel.
        high: the value at the last pixel, above `low`.
        first: pixel.
        last: pixel.
    """

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return round(self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first), 1)


def ticks(values: list[float], most: float = math.inf) -> list[float]:
    """Evenly spaced round numbers that cover the values.

    Args:
        values: at least one.
        most: no tick is above this.
    """
    low, high = min(values), min(most, max(values))
    rough = max(high - low, 1e-3) / TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
