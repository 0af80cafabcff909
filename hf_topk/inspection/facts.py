"""What there is to know of a converted model: the model itself, the metrics of its conversion, and observations."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..compute_dtype import READING
from ..console import as_json
from ..documents import read_documents
from ..evaluation.fidelity import measure_fidelity
from ..evaluation.observations import OBSERVATIONS_FILE, Observations, Observer
from ..evaluation.outputs import target_windows
from ..loading import load_converted
from ..model.errors import InputError, one_line
from ..model.hub_card import read_beside
from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..windows import Window, make_windows, readable_length
from .speed import Speed

T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """All that is known of a converted model.

    Attributes:
        name: of the model, for people: that of its folder without those above it, or its repository.
        model: the model.
        processor: its tokenizer, or its processor if it is a speech model.
        metrics: as in `figures.json`; empty if there are none.
        recipe: every choice of the conversion by name; empty if there is none.
        observations: made along with the metrics; None if there are none.
        speed: of decoding; None if it was not measured.
    """

    name: str
    model: TopKExpertsForCausalLM
    processor: Any
    metrics: dict[str, Any]
    recipe: dict[str, Any]
    observations: Observations | None = None
    speed: Speed | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def measured_on(self) -> str:
        """What the metrics were measured on, for people."""
        on = self.observations.text if self.observations else "held-out documents of the calibration text"
        return f"{self.metrics['positions']:,} positions of {on}"

    def choices(self) -> list[tuple[str, str, str]]:
        """Name, value and meaning of each choice of the recipe, for people; without the folder of a text."""
        from ..convert.recipe import Recipe, public_name

        recipe = (
            {**self.recipe, "text": public_name(str(self.recipe["text"]))} if "text" in self.recipe else self.recipe
        )
        about = {field.name: field.metadata for field in dataclasses.fields(Recipe)}
        return [
            (name, str(about[name]["unset"] if value is None else value), about[name]["what"])
            for name, value in recipe.items()
            if name in about
        ]

    def experts_by_use(self) -> list[int]:
        """Numbers of the experts, those picked most often first; in their own order if that is not known."""
        experts = range(self.model.head.num_experts)
        if self.observations is None:
            return list(experts)
        picks = self.observations.picks
        return sorted(experts, key=lambda expert: -picks[expert])

    def tokens_of(self, experts: Sequence[int]) -> list[list[str]]:
        """The tokens of experts as text, likeliest first.

        Args:
            experts: their numbers.
        """
        head, which = self.model.head, torch.tensor(experts, dtype=torch.long)
        ids = head.expert_ids.cpu()[which]
        prior = head.mask_padding(head.tail.log_prior.cpu()[which].float(), ids)
        prior, order = prior.sort(dim=-1, descending=True, stable=True)
        counts = (prior > -torch.inf).sum(dim=-1).tolist()
        rows = ids.gather(1, order).tolist()
        return [self.texts(row[:count]) for row, count in zip(rows, counts, strict=True)]

    def always_on(self) -> list[str]:
        """The always-on tokens as text."""
        return self.texts(self.model.head.always_on_ids.tolist())

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself; its number if it has none."""
        texts = self.tokenizer.batch_decode([[token] for token in ids])
        return [text or f"[{token}]" for text, token in zip(texts, ids, strict=True)]


def read_facts(name: str, speed: Path | None = None, *, runs: bool = False) -> Facts:
    """Load a converted model with what its conversion left beside it.

    Args:
        name: a folder, or a repository of the Hub.
        speed: a file with what `hf-topk bench --json` printed of it.
        runs: whether the model is going to run, so that it is loaded for speed and to the accelerator, if any.

    Raises:
        InputError: when there is no converted model of that name, or a file is damaged.
    """
    import yaml

    folder = Path(name).expanduser()
    model, processor = load_converted(name, device="auto" if runs else "cpu", fastest_for=READING if runs else None)
    metrics = _read(name, "figures.json", lambda text: dict(json.loads(text))) or {}
    recipe = _read(name, "recipe.yaml", lambda text: dict(yaml.safe_load(text))) or {}
    observations = _read(name, OBSERVATIONS_FILE, Observations.from_json) if metrics else None
    if observations and len(observations.picks) != model.head.num_experts:
        raise InputError(f"{OBSERVATIONS_FILE} of {name} is of another model: remove it")
    shown = folder.resolve().name if folder.is_dir() else name
    return Facts(
        shown, model, processor, metrics, recipe, observations, None if speed is None else Speed.read(speed, model.head)
    )


def _read(name: str, file: str, parse: Callable[[str], T]) -> T | None:
    """Parse a file beside the model; None if there is none."""
    import yaml

    if not (text := read_beside(name, file)):
        return None
    try:
        return parse(text)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = f"{file} of {name} is damaged ({one_line(error)}): remove it, or fetch the model again"
        raise InputError(reason) from error


def measure_on(facts: Facts, text: str, positions: int | None) -> Facts:
    """The facts with metrics and observations on another text.

    Args:
        facts: of a converted model.
        text: a source as in [`read_documents`], or what suits a model with an encoder.
        positions: of a random sample; None for all of the text.

    Raises:
        InputError: when the text cannot be read, or does not suit the model.
    """
    from ..convert.checkpoint.agreement_plot import POSITIONS, measure_around
    from ..convert.steps.held_out import dense_argmax

    windows = _windows_of(facts, text, positions)
    observer = Observer(facts.model.head)
    fidelity = measure_fidelity(facts.model, windows, observer)
    some = windows[:: -(-fidelity.positions // POSITIONS)]
    curve = measure_around(facts.model, dense_argmax(facts.model, some))
    measured = {**dataclasses.asdict(fidelity), "target_reached": None}
    return dataclasses.replace(
        facts,
        metrics={
            **facts.metrics,
            **json.loads(as_json(measured)),
            "curve": [dataclasses.asdict(point) for point in curve],
        },
        observations=observer.observations(text),
    )


def _windows_of(facts: Facts, text: str, positions: int | None) -> list[Window]:
    model = facts.model
    if model.config.is_encoder_decoder:
        return target_windows(model, facts.processor, text, positions)
    return make_windows(read_documents(text), facts.tokenizer, readable_length(model.config), positions, seed=0)
