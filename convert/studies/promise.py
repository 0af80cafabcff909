"""Whether a target agreement is kept: `python -m studies.promise CONVERTED --text TEXT`.

On random halves of the documents of a text that the router has not seen, k and R are chosen as a conversion chooses
them, and the other half says whether documents like those keep the promise.
"""

import dataclasses
import json
import random
from statistics import median
from typing import Annotated

import torch
import typer

from hf_topk.cli import main
from hf_topk.convert.recipe import TARGET_AGREEMENT
from hf_topk.convert.steps.calibrate import DenseChoices, Reach, Target, agrees, choose, dense_choices, reach
from hf_topk.documents import read_documents
from hf_topk.loading import load_converted
from hf_topk.model.errors import InputError
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.windows import WINDOW_LENGTH, make_windows, readable_length

FEWEST_DOCUMENTS = 4
POSITIONS = 8000


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One split.

    Attributes:
        num_experts_per_tok: the k that was chosen.
        num_rescored: the R that was chosen.
        bound: the lower bound of the agreement that they were chosen by.
        agreement: on the other documents.
        positions: positions of those.
    """

    num_experts_per_tok: int
    num_rescored: int
    bound: float
    agreement: float
    positions: int


def try_split(
    model: TopKExpertsForCausalLM, choices: DenseChoices, reached: Reach, target: float, seed: int
) -> Outcome:
    """Choose k and R on half of the documents, and measure on the others.

    Args:
        model: a converted model; its k and R are set.
        choices: what the dense head chooses on text that the router has not seen.
        reached: where its choices stand.
        target: the agreement that is promised.
        seed: of the split.

    Raises:
        InputError: when the text has fewer than 4 documents.
    """
    documents = choices.documents.unique().tolist()
    if len(documents) < FEWEST_DOCUMENTS:
        raise InputError(f"the text has {len(documents)} documents, too few to split: give {FEWEST_DOCUMENTS} or more")
    chosen_on = torch.tensor(random.Random(seed).sample(documents, len(documents) // 2))
    is_chosen_on = torch.isin(choices.documents, chosen_on.to(choices.documents.device))
    seen, others = choices.part(is_chosen_on), choices.part(~is_chosen_on)
    choose(model, seen, reached.part(is_chosen_on), Target(target, or_nearest=True))
    head = model.head
    bound = seen.bound(agrees(head, seen))
    agreement = float(agrees(head, others).double().mean())
    return Outcome(head.num_experts_per_tok, head.num_rescored, bound, agreement, len(others.best))


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
    model: Annotated[str, typer.Argument(metavar="CONVERTED", help="A converted model.")],
    text: Annotated[str, typer.Option(help="Text of several documents that the router has not seen.")],
    target_agreement: Annotated[float, typer.Option(help="The agreement that is promised.")] = TARGET_AGREEMENT,
    positions: Annotated[int, typer.Option(help="Tokens of the text.")] = POSITIONS,
    splits: Annotated[int, typer.Option(min=1, help="Random splits of the documents.")] = 20,
) -> None:
    """Choose k and R on random halves of the documents, and count how often the others agree as was promised.

    Prints a line of JSON for each split, and one of all at the end.
    """
    converted, tokenizer = load_converted(model, dtype="float32")
    length = readable_length(converted.config, WINDOW_LENGTH)
    choices = dense_choices(converted, make_windows(read_documents(text), tokenizer, length, positions, seed=0))
    reached = reach(converted.head, choices)
    outcomes = []
    for seed in range(splits):
        outcome = try_split(converted, choices, reached, target_agreement, seed)
        outcomes.append(outcome)
        is_kept = outcome.agreement >= target_agreement
        print(json.dumps({"split": seed, **dataclasses.asdict(outcome), "is_kept": is_kept}), flush=True)
    print(json.dumps(summary(outcomes, target_agreement)))


if __name__ == "__main__":
    main(app)
