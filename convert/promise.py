"""Whether a target agreement is kept: `python -m hf_topk.convert.promise`, over random splits of a sample."""

import dataclasses
import json
import random
from statistics import median
from typing import Annotated

import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_topk.cli import main
from hf_topk.errors import InputError
from hf_topk.measure.fidelity import measure_fidelity, readable_length
from hf_topk.text import Window

from .dense import load_dense
from .pipeline import convert, sample_from_text
from .preflight import load_tokenizer
from .recipe import MIXED, Recipe
from .source import find_folder, open_source

TESTED = 0.2  # share of the documents that a split sets aside
FEWEST_DOCUMENTS = 5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One split.

    Attributes:
        num_experts_per_tok: the k that was chosen.
        bound: the lower bound of the agreement that it was chosen by.
        agreement: on the documents set aside, which neither distillation nor the choice of k has seen.
        positions: positions of those documents.
    """

    num_experts_per_tok: int
    bound: float
    agreement: float
    positions: int


def try_split(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe, windows: list[Window], seed: int
) -> Outcome:
    """Convert on some documents of a sample and measure on the others.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        recipe: every choice, with a target agreement.
        windows: the sample.
        seed: of the split.

    Raises:
        InputError: when the sample has fewer than 5 documents.
    """
    documents = sorted({window.document for window in windows})
    if len(documents) < FEWEST_DOCUMENTS:
        raise InputError(
            f"the sample has {len(documents)} documents, too few to split: give {FEWEST_DOCUMENTS} or more"
        )
    tested = set(random.Random(seed).sample(documents, max(1, round(TESTED * len(documents)))))
    seen = [window for window in windows if window.document not in tested]
    report = convert(model, tokenizer, dataclasses.replace(recipe, seed=seed), windows=seen)
    fidelity = measure_fidelity(report.model, [window for window in windows if window.document in tested])
    return Outcome(
        report.model.head.num_experts_per_tok,
        report.fidelity.agreement_lower_bound,
        fidelity.agreement,
        fidelity.positions,
    )


def summary(outcomes: list[Outcome], target_agreement: float) -> dict[str, int | float]:
    """What all splits come to: how many kept the promise; median, smallest and largest k and agreement.

    Args:
        outcomes: of the splits, at least one.
        target_agreement: what was promised.
    """
    figures: dict[str, int | float] = {
        "splits": len(outcomes),
        "kept": sum(one.agreement >= target_agreement for one in outcomes),
    }
    for name in ("num_experts_per_tok", "agreement"):
        values = [getattr(one, name) for one in outcomes]
        figures |= {f"{name}_{kind.__name__}": kind(values) for kind in (median, min, max)}
    return figures


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def promise(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The dense model; the bundled one if left out.")
    ] = None,
    text: Annotated[str, typer.Option(help="The sample: text of several documents.")] = MIXED,
    target_agreement: Annotated[float, typer.Option(help="The agreement that is promised.")] = 0.995,
    positions: Annotated[int, typer.Option(help="Tokens of the sample.")] = Recipe.positions,
    splits: Annotated[int, typer.Option(min=1, help="Random splits of the documents.")] = 20,
) -> None:
    """Convert on random splits of a sample, and count how often documents set aside agree as was promised.

    Prints a line of JSON for each split, and one of all at the end.
    """
    choices = {"text": text, "positions": positions, "target_agreement": target_agreement, "allow_below_target": True}
    recipe = Recipe.from_dict(choices)
    folder = find_folder(model)
    source = open_source(model or str(folder), folder)
    dense, tokenizer = load_dense(source), load_tokenizer(source.folder)
    length = readable_length(dense.config, recipe.window_length)
    recipe = dataclasses.replace(recipe, window_length=length)
    windows, _ = sample_from_text(tokenizer, recipe)
    outcomes = []
    for seed in range(splits):
        outcome = try_split(dense, tokenizer, recipe, windows, seed)
        outcomes.append(outcome)
        is_kept = outcome.agreement >= target_agreement
        print(json.dumps({"split": seed, **dataclasses.asdict(outcome), "is_kept": is_kept}), flush=True)
    print(json.dumps(summary(outcomes, target_agreement)))


if __name__ == "__main__":
    main(app)
