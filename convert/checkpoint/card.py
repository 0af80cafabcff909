"""The model card of a converted model."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_topk.model.dense_model import takes_images
from hf_topk.model.hub_card import CARD_FILE, PLOT_FILE, TAGS

from ..recipe import TARGET_AGREEMENT, calibration_text_name, public_name
from ..report import Report
from ..source import DEMO, Source
from .agreement_plot import draw

DEMO_NAME = "books"
INHERITED = ("base_model", "license", "license_name", "license_link", "language")
CACHED_REPOSITORY = re.compile(r"/models--([^/]+)/snapshots/[^/]+$")
TASKS = {  # as the Hub calls what a model of an Auto class does
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSeq2SeqLM": "translation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
METRICS = {  # key in figures.json: type and name in the card's metadata
    "agreement": ("agreement", "Top-1 agreement with the dense head"),
    "top5_containment": ("top5_containment", "Top-5 recall of the dense argmax"),
    "kl": ("kl", "KL divergence from the dense head, nats"),
    "perplexity_sparse": ("perplexity", "Perplexity"),
    "bytes_read": ("bytes_read", "Share of the head's bytes read per position"),
}


def write_card(report: Report, source: Source, folder: Path) -> None:
    """Write the card, README.md, and its plot, from the metrics of a conversion.

    Licence and languages come from the dense model's card, and so does the base model if the dense model's own
    repository is unknown.

    Args:
        report: of the conversion.
        source: the dense checkpoint.
        folder: to write to.
    """
    base = _base_metadata(source.folder)
    name, repository = _names(source)
    if repository:
        base["base_model"] = repository
    title = f"{name}-topk"
    text_name = calibration_text_name(report.recipe.text)
    metrics = report.metrics()
    model = report.model
    has_images = takes_images(model.base)
    auto_class = model.auto_class
    dense_auto_class = "AutoModelForImageTextToText" if has_images else auto_class
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS[dense_auto_class],
        tags=list(TAGS),
        model_name=title,
        eval_results=_results(metrics, f"held-out part of {text_name}"),
        **base,
    )
    if report.curve:
        plot = draw(report.curve, metrics["num_experts_per_tok"])
        (folder / PLOT_FILE).write_text(plot, encoding="utf-8")
    text = _template().render(
        title=title,
        base_name=name,
        repository=repository,
        takes_images=has_images,
        auto_class=auto_class,
        dense_auto_class=dense_auto_class,
        vocab_size=report.model.head.out_features,
        recipe=report.recipe,
        recipe_yaml=dataclasses.replace(report.recipe, text=public_name(report.recipe.text)).to_yaml(),
        metrics=metrics,
        text_name=text_name,
        with_logits=report.observations.positions,
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
    """Licence, languages and base model in the dense model's card."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, yaml.YAMLError):  # an unreadable card does not stop the conversion
        return {}
    return {key: data[key] for key in INHERITED if data.get(key)}


def _names(source: Source) -> tuple[str, str | None]:
    """The dense model's short name and, if known, its repository on the Hub."""
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


def _results(metrics: dict[str, Any], dataset: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=dataset,
            metric_type=kind,
            metric_name=name,
            metric_value=round(metrics[key], 4),
        )
        for key, (kind, name) in METRICS.items()
        if math.isfinite(metrics[key])
    ]
