"""Transformers' logits processors, as they suit a sparse head."""

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from .errors import InputError
from .nucleus import SelectingTopPLogitsWarper


class RefusingNothing(LogitsProcessor):
    """Raises an error where the processors before it left no token, as a grammar may do with a model without a tail."""

    supports_continuous_batching = True

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Check scores [B, V], and return them as they are.

        Raises:
            InputError: when no score of a row is finite.
        """
        if not torch.compiler.is_compiling() and not scores.isfinite().any(dim=-1).all():
            raise InputError(
                "none of the tokens that are allowed here was scored, and without a tail all others are impossible: "
                "convert with another --tail than none, or generate with head_mode 'dense' or lossless=True"
            )
        return scores


def adapt(found: LogitsProcessorList, has_tail: bool) -> LogitsProcessorList:
    """Put what is quicker, or safer, in the place of Transformers' own; not to be used where sums have to be the same.

    Args:
        found: what Transformers made of the choices of a generation; changed.
        has_tail: whether tokens that are not scored have a probability.
    """
    for place, one in enumerate(found):
        if type(one) is TopPLogitsWarper:
            found[place] = SelectingTopPLogitsWarper(one.top_p, one.filter_value, one.min_tokens_to_keep)
    if found and not has_tail:
        found.append(RefusingNothing())
    return found
