"""The model card of a converted model."""

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .pipeline import Report
from .recipe import SELF
from .source import DEMO, Source

DEMO_NAME = "books"


def write_card(report: Report, source: Source, folder: Path) -> None:
    """Write the card, README.md, from what was measured; licence and languages come from the base model's card.

    Args:
        report: what was converted.
        source: the dense checkpoint.
        folder: where the card goes.
    """
    base = _base_metadata(source.folder)
    name, repository = _names(source)
    title = f"{name}-topk"
    data = ModelCardData(
        base_model=repository,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf-topk", "topk_experts"],
        model_name=title,
        eval_results=_results(report),
        **base,
    )
    text = _template().render(
        title=title,
        base_name=name,
        repository=repository,
        vocab_size=report.model.head.out_features,
        num_experts=report.num_experts,
        recipe=report.recipe,
        recipe_yaml=report.recipe.to_yaml(),
        figures=report.figures(),
        sample=_sample(report.recipe.text),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    return environment.get_template("card.md.jinja")


def _base_metadata(folder: Path) -> dict[str, Any]:
    """Licence and languages of the base model, as far as its card tells."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError):  # a card without readable metadata is no reason not to convert
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link", "language") if data.get(key)}


def _names(source: Source) -> tuple[str, str | None]:
    """The base model's short name and, if it is on the Hub, its repository."""
    if source.folder == DEMO:
        return DEMO_NAME, None
    path = Path(source.name).expanduser()
    return (path.resolve().name, None) if path.is_dir() else (source.name.rpartition("/")[2], source.name)


def _sample(text: str) -> str:
    return "text that the model wrote itself" if text == SELF else Path(text).name


def _results(report: Report) -> list[EvalResult]:
    figures = {"agreement": report.fidelity.agreement, "perplexity": report.fidelity.perplexity_sparse}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"held-out part of {_sample(report.recipe.text)}",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in figures.items()
        if math.isfinite(value)
    ]
