"""Transformers' logits processors, as they suit a sparse head."""

from transformers import LogitsProcessorList, TopPLogitsWarper

from .nucleus import SelectingTopPLogitsWarper


def adapt(found: LogitsProcessorList) -> LogitsProcessorList:
    """Put what is quicker in the place of Transformers' own; not to be used where sums have to be the same.

    Args:
        found: what Transformers made of the choices of a generation; changed.
    """
    for place, one in enumerate(found):
        if type(one) is TopPLogitsWarper:
            found[place] = SelectingTopPLogitsWarper(one.top_p, one.filter_value, one.min_tokens_to_keep)
    return found
