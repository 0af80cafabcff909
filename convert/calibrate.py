"""The last step: measure a converted model on documents that it was not distilled on."""

import random

from hf_topk.errors import InputError
from hf_topk.measure.fidelity import Fidelity, measure_fidelity
from hf_topk.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.text import Window


def split_by_document(windows: list[Window], held_out: float, seed: int) -> tuple[list[Window], list[Window]]:
    """Split windows into those to distil on and those to measure on, no document in both.

    A single document is split at the end of its first part instead.

    Args:
        windows: at least two.
        held_out: share of the documents to measure on; at least one document.
        seed: of the choice.

    Returns:
        Windows to distil on and windows to measure on, neither of them empty.

    Raises:
        InputError: when there is only one window.
    """
    if len(windows) < 2:
        raise InputError("the sample is a single window of tokens, which cannot be split: give more text")
    documents = sorted({window.document for window in windows})
    if len(documents) == 1:
        first = min(len(windows) - 1, max(1, round(len(windows) * (1 - held_out))))
        return windows[:first], windows[first:]
    count = min(len(documents) - 1, max(1, round(len(documents) * held_out)))
    chosen = set(random.Random(seed).sample(documents, count))
    return (
        [window for window in windows if window.document not in chosen],
        [window for window in windows if window.document in chosen],
    )


def calibrate(model: TopKExpertsForCausalLM, held_out: list[Window]) -> Fidelity:
    """Measure the model at its own k on windows that it was not distilled on.

    Args:
        model: the converted model.
        held_out: windows of documents that the router has not seen.
    """
    return measure_fidelity(model, held_out)
