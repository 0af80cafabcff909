"""How often a target agreement is kept on new documents.

    make study NAME=promise ARGS="CONVERTED --text TEXT"

The documents of a text that the conversion has not seen are split in random halves. On one half k and R are chosen as
a conversion chooses them; on the other half the agreement is measured.
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
from hf_topk.convert.steps.choose_operating_point import (
    ArgmaxRanks,
    Target,
    agrees,
    choose_operating_point,
    rank_argmax,
)
from hf_topk.convert.steps.held_out import DenseArgmax
from hf_topk.model.errors import InputError
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from studies.measured_text import load_and_run

FEWEST_DOCUMENTS = 4
POSITIONS = 8000


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one split.

    Attributes:
        num_experts_per_tok: the chosen k.
        num_rescored: the chosen R.
        bound: the lower bound of the agreement on the first half.
        agreement: on the second half.
        positions: of the second half.
    """

    num_experts_per_tok: int
    num_rescored: int
    bound: float
    agreement: float
    positions: int


def try_split(
    model: TopKExpertsForCausalLM, dense: DenseArgmax, ranks: ArgmaxRanks, target: float, seed: int
) -> Outcome:
    """Choose k and R on half of the documents, and measure on the others.

    Args:
        model: a converted model; its k and R are set.
        dense: the dense argmax on text that the conversion has not seen.
        ranks: of this argmax.
        target: the target agreement.
        seed: of the split.

    Raises:
        InputError: when the text has fewer than 4 documents.
    """
    documents = dense.documents.unique().tolist()
    if len(documents) < FEWEST_DOCUMENTS:
        raise InputError(f"the text has {len(documents)} documents, too few to split: give {FEWEST_DOCUMENTS} or more")
    chosen_on = torch.tensor(random.Random(seed).sample(documents, len(documents) // 2))
    is_chosen_on = torch.isin(dense.documents, chosen_on.to(dense.documents.device))
    seen, others = dense.part(is_chosen_on), dense.part(~is_chosen_on)
    choose_operating_point(model, seen, ranks.part(is_chosen_on), Target(target, or_nearest=True))
    head = model.head
    bound = seen.bound(agrees(head, seen))
    agreement = float(agrees(head, others).double().mean())
    return Outcome(head.num_experts_per_tok, head.num_rescored, bound, agreement, len(others.best))


def summary(outcomes: list[Outcome], target_agreement: float) -> dict[str, int | float]:
    """Summarise the splits: how many kept the target; median, smallest and largest k and agreement.

    Args:
        outcomes: of the splits, at least one.
        target_agreement: of all splits.
    """
    metrics: dict[str, int | float] = {
        "splits": len(outcomes),
        "kept": sum(one.agreement >= target_agreement for one in outcomes),
    }
    for name in ("num_experts_per_tok", "agreement"):
        values = [getattr(one, name) for one in outcomes]
        metrics |= {f"{name}_{kind.__name__}": kind(values) for kind in (median, min, max)}
    return metrics


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def promise(
    model: Annotated[str, typer.Argument(metavar="CONVERTED", help="A converted model.")],
    text: Annotated[str, typer.Option(help="Text of several documents that the conversion has not seen.")],
    target_agreement: Annotated[float, typer.Option(help="The target agreement.")] = TARGET_AGREEMENT,
    positions: Annotated[int, typer.Option(help="Tokens to measure on.")] = POSITIONS,
    splits: Annotated[int, typer.Option(min=1, help="Random splits of the documents.")] = 20,
) -> None:
    """Choose k and R on random halves of the documents, and count how often the other halves keep the target.

    Prints a line of JSON per split, and a summary at the end.
    """
    converted, dense = load_and_run(model, text, positions)
    ranks = rank_argmax(converted.head, dense)
    outcomes = []
    for seed in range(splits):
        outcome = try_split(converted, dense, ranks, target_agreement, seed)
        outcomes.append(outcome)
        is_kept = outcome.agreement >= target_agreement
        print(json.dumps({"split": seed, **dataclasses.asdict(outcome), "is_kept": is_kept}), flush=True)
    print(json.dumps(summary(outcomes, target_agreement)))


if __name__ == "__main__":
    main(app)
