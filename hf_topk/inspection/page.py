"""The report of a converted model as one self-contained HTML page."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..evaluation.observations import CAUSES, Miss
from ..model.errors import InputError, TopKExpertsError
from ..progress import progress_once_slow
from . import plots
from .facts import Facts

REPORT_FILE = "report.html"
SPACE, LINE_END = "\N{OPEN BOX}", "\N{RETURN SYMBOL}"
EXPERTS_AT_ONCE = 256


def check_page(path: Path) -> None:
    """Refuse a file that the page cannot be written to.

    Raises:
        InputError: when its folder is missing, or it is a folder.
    """
    if path.is_dir() or not path.parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"{path} cannot be written: {reason}")


def write_page(facts: Facts, path: Path) -> None:
    """Write the report of a model, completely or not at all.

    Args:
        facts: of the model.
        path: of the file.

    Raises:
        TopKExpertsError: when it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(make_page(facts), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise TopKExpertsError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def make_page(facts: Facts) -> str:
    """The report of a model, as HTML that needs nothing else.

    Args:
        facts: of the model.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    environment.filters["token"] = visible
    environment.globals["inline"] = lambda name: Markup((folder / name).read_text(encoding="utf-8"))
    return environment.get_template("report.html.jinja").render(**_content(facts))


def visible(token: str) -> str:
    """A token as text in which every character can be seen: spaces as open boxes, control characters by their code.

    Args:
        token: its text.
    """
    if token.isprintable():
        return token.replace(" ", SPACE)
    return "".join(map(_visible, token))


def _visible(character: str) -> str:
    if character == "\n":
        return LINE_END
    return visible(character) if character.isprintable() else f"\\u{{{ord(character):X}}}"


def _content(facts: Facts) -> dict[str, Any]:
    head, seen, metrics = facts.model.head, facts.observations, facts.metrics
    even = head.num_experts_per_tok / head.num_experts
    places, variance = plots.map_of_experts(head)
    curve = metrics.get("curve")
    return {
        "facts": facts,
        "head": head,
        "metrics": metrics,
        "seen": seen,
        "plots": plots,
        "agreement": plots.agreement_plot(curve, head.num_experts_per_tok) if curve else None,
        "calibration": plots.calibration_plot(seen.calibration) if seen and seen.calibration else None,
        "load": plots.load_plot(seen.picks, seen.positions, even) if seen else None,
        "even": even,
        "variance": variance,
        "data": _data(facts, places),
        "misses": [_shown(facts, miss) for miss in seen.misses] if seen else [],
        "recipe": facts.choices(),
        "dense_class": type(facts.model.base).__name__,
        "version": version("hf-topk"),
    }


def _data(facts: Facts, places: list[tuple[int, int]]) -> str:
    """The experts in order of use, as JSON that may stand in a page's script element."""
    seen, experts, rows = facts.observations, facts.experts_by_use(), []
    with progress_once_slow("Reading the experts' tokens", len(experts), "experts") as advance:
        for start in range(0, len(experts), EXPERTS_AT_ONCE):
            some = experts[start : start + EXPERTS_AT_ONCE]
            for expert, tokens in zip(some, facts.tokens_of(some), strict=True):
                picks = seen.picks[expert] if seen else None
                rows.append([expert, *places[expert], picks, [visible(token) for token in tokens]])
            advance(len(some))
    data = {
        "experts": rows,
        "alwaysOn": [visible(token) for token in facts.always_on()],
        "positions": seen.positions if seen else None,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # so that no token ends the element


def _shown(facts: Facts, miss: Miss) -> dict[str, Any]:
    """A miss with its tokens as text."""
    dense, sparse = facts.texts([miss.dense, miss.sparse])
    before = facts.tokenizer.decode(miss.before)
    return {
        "miss": miss,
        "before": " ".join(visible(part).replace(SPACE, " ") for part in before.splitlines(keepends=True)),
        "dense": dense,
        "sparse": sparse,
        "follower": None if miss.follower is None else facts.texts([miss.follower])[0],
        "cause": CAUSES[miss.cause],
    }
