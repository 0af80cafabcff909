"""The model card of a converted model."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_topk.model.dense_model import looks_at_images
from hf_topk.model.hub_card import CARD_FILE, PLOT_FILE, TAGS

from ..recipe import TARGET_AGREEMENT, public_name, sample_name
from ..report import Report
from ..source import DEMO, Source
from .agreement_plot import draw

DEMO_NAME = "books"
INHERITED = ("base_model", "license", "license_name", "license_link", "language")
CACHED_REPOSITORY = re.compile(r"/models--([^/]+)/snapshots/[^/]+$")
METRICS = {  # key in figures: its type and name among the card's results
    "agreement": ("agreement", "Agreement with the dense head"),
    "top5_containment": ("top5_containment", "Dense argmax among the five likeliest"),
    "kl": ("kl", "KL divergence from the dense head, nats"),
    "perplexity_sparse": ("perplexity", "Perplexity"),
    "bytes_read": ("bytes_read", "Bytes of the head read for a position, share"),
}


def write_card(report: Report, source: Source, folder: Path) -> None:
    """Write the card, README.md, and the plot that it shows, from what was measured.

    Licence and languages come from the dense model's card, and so does the base model where its own repository is not
    known.

    Args:
        report: what was converted.
        source: the dense checkpoint.
        folder: where the card goes.
    """
    base = _base_metadata(source.folder)
    name, repository = _names(source)
    if repository:
        base["base_model"] = repository
    title = f"{name}-topk"
    sample = sample_name(report.recipe.text)
    figures = report.figures()
    takes_images = looks_at_images(report.model.base)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if takes_images else "text-generation",
        tags=list(TAGS),
        model_name=title,
        eval_results=_results(figures, f"held-out part of {sample}"),
        **base,
    )
    if report.curve:
        plot = draw(report.curve, figures["num_experts_per_tok"])
        (folder / PLOT_FILE).write_text(plot, encoding="utf-8")
    text = _template().render(
        title=title,
        base_name=name,
        repository=repository,
        takes_images=takes_images,
        dense_auto_class="AutoModelForImageTextToText" if takes_images else "AutoModelForCausalLM",
        vocab_size=report.model.head.out_features,
        recipe=report.recipe,
        recipe_yaml=dataclasses.replace(report.recipe, text=public_name(report.recipe.text)).to_yaml(),
        figures=figures,
        sample=sample,
        target_agreement=report.recipe.target_agreement or TARGET_AGREEMENT,
        plot=PLOT_FILE if report.curve else None,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / CARD_FILE)


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # Markdown, not HTML
    )
    return environment.get_template("card.md.jinja")


def _base_metadata(folder: Path) -> dict[str, Any]:
    """What the dense model's card tells of its origin."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, yaml.YAMLError):  # a card without readable metadata is no reason not to convert
        return {}
    return {key: data[key] for key in INHERITED if data.get(key)}


def _names(source: Source) -> tuple[str, str | None]:
    """The dense model's short name and, if it is known, its repository on the Hub."""
    if source.folder == DEMO:
        return DEMO_NAME, None
    path = Path(source.name).expanduser()
    if not path.is_dir():
        return source.name.rpartition("/")[2], source.name
    cached = CACHED_REPOSITORY.search(path.resolve().as_posix())
    if cached:
        repository = cached[1].replace("--", "/")
        return repository.rpartition("/")[2], repository
    return path.resolve().name, None


def _results(figures: dict[str, Any], dataset: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=dataset,
            metric_type=kind,
            metric_name=name,
            metric_value=round(figures[key], 4),
        )
        for key, (kind, name) in METRICS.items()
        if math.isfinite(figures[key])
    ]
