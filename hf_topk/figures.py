"""Figures as JSON, in which there is neither infinity nor a number that is none."""

import json
import math
from typing import Any


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
