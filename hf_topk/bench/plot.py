"""A picture of what `hf-topk bench` measured."""

from pathlib import Path
from typing import Any

from ..model.errors import InputError
from .baselines import INSTALL
from .report import NAMES

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Refuse a file that could not be drawn.

    Raises:
        InputError: when it is no .png or .svg file, its folder is not there, or matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} is not drawn: give --plot a file that ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"--plot needs matplotlib: {INSTALL}") from error


def write_plot(figures: dict[str, Any], path: Path) -> None:
    """Draw head times and decoding speeds as bars, with their quartiles.

    Args:
        figures: of [`run_bench`].
        path: a .png or .svg file; it is written whole or not at all.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = picture.subplots(1, 2)
    _bars(left, figures, "head", "ms")
    left.set(xscale="log", xlabel="the head, milliseconds a token")
    _bars(right, figures, "e2e", "tok_s")
    right.set(xlabel="decoding, tokens a second")
    picture.suptitle(
        f"{figures['shape']}, batch 1, {figures['dtype']}, {figures['threads']} threads of {figures['machine']}"
    )
    partial = path.with_name(f".{path.name}.partial")
    try:
        picture.savefig(partial, format=path.suffix.removeprefix("."))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _bars(axes: Any, figures: dict[str, Any], section: str, unit: str) -> None:
    medians, spread = figures[section], figures["spread"][section]
    names = [name for name in NAMES if medians.get(f"{name}_{unit}") is not None][::-1]
    values = [medians[f"{name}_{unit}"] for name in names]
    around = [spread[f"{name}_{unit}"] for name in names]
    errors = [[value - low for value, (low, _) in zip(values, around, strict=True)]]
    errors.append([high - value for value, (_, high) in zip(values, around, strict=True)])
    bars = axes.barh([NAMES[name] for name in names], values, xerr=errors)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.margins(x=0.15)
