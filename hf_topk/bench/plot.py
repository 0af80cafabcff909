"""Plots the results of `hf-topk bench`."""

from pathlib import Path
from typing import Any

from ..model.errors import InputError
from .baselines import INSTALL
from .report import NAMES

SUFFIXES = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Refuse a file that the plot cannot be written to.

    Raises:
        InputError: when it is not a .png or .svg file, its folder is missing, or matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"cannot plot to {path}: give --plot a file that ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"--plot needs matplotlib: {INSTALL}") from error


def write_plot(metrics: dict[str, Any], path: Path) -> None:
    """Plot head times and decoding speeds as bars, with quartiles.

    Args:
        metrics: of [`run_bench`].
        path: a .png or .svg file, written completely or not at all.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = picture.subplots(1, 2)
    _bars(left, metrics, "head", "ms")
    left.set(xscale="log", xlabel="head, ms per token")
    _bars(right, metrics, "e2e", "tok_s")
    right.set(xlabel="decoding, tokens/s")
    picture.suptitle(
        f"{metrics['shape']}, batch 1, {metrics['dtype']}, {metrics['threads']} threads of {metrics['machine']}"
    )
    partial = path.with_name(f".{path.name}.partial")
    try:
        picture.savefig(partial, format=path.suffix.removeprefix("."))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _bars(axes: Any, metrics: dict[str, Any], section: str, unit: str) -> None:
    medians, spread = metrics[section], metrics["spread"][section]
    names = [name for name in NAMES if medians.get(f"{name}_{unit}") is not None][::-1]
    values = [medians[f"{name}_{unit}"] for name in names]
    around = [spread[f"{name}_{unit}"] for name in names]
    errors = [[value - low for value, (low, _) in zip(values, around, strict=True)]]
    errors.append([high - value for value, (_, high) in zip(values, around, strict=True)])
    bars = axes.barh([NAMES[name] for name in names], values, xerr=errors)
    axes.bar_label(bars, fmt="%.3g", padding=4)
    axes.margins(x=0.15)
