"""Ties of head and input embeddings: makes a dense model's configuration agree with its tensors."""

import re

from torch import Tensor
from transformers import PreTrainedModel

from .errors import InputError


def check_ties(dense: PreTrainedModel) -> None:
    """Refuse a dense model whose configuration cannot express whether head and input embeddings are tied.

    Args:
        dense: a dense model with a head.

    Raises:
        InputError: when they are tied, but its class never ties them; or when they are not, but the configuration
            entry that ties them also ties other tensors.
    """
    are_tied, name = _unlike_its_configuration(dense), type(dense).__name__
    parts = _parts_with_head(dense)
    if are_tied and not any(_head_in_entry(part) for part in parts):
        raise InputError(
            f"head and input embeddings of this {name} are one tensor, but its class does not tie them when it is "
            "loaded: give its head a copy of its own"
        )
    others = [] if are_tied is not False else [other for part in parts for other in _tied_beside_head(part)]
    if others:
        raise InputError(
            f"this {name} has a head of its own, but its configuration ties it to the input embeddings, and ties "
            f"'{others[0]}' by the same entry: set `tie_word_embeddings` to false, and save that as a tensor of its own"
        )


def settle_ties(dense: PreTrainedModel) -> None:
    """Set `tie_word_embeddings` in a dense model's configuration to whether head and input embeddings are tied.

    The configuration may be wrong: Transformers keeps the two apart if a checkpoint has both and they differ, and users
    can tie or untie them.

    Args:
        dense: a dense model with a head; its configuration is changed.

    Raises:
        InputError: as [`check_ties`].
    """
    check_ties(dense)
    are_tied = _unlike_its_configuration(dense)
    if are_tied is None:
        return
    for part in _parts_with_head(dense):
        for config in (part.config, part.config.get_text_config()):  # some models read one, some the other
            config.tie_word_embeddings = are_tied


def _unlike_its_configuration(dense: PreTrainedModel) -> bool | None:
    """Whether head and input embeddings are tied, if the configuration says otherwise; None if it is right."""
    head, embeddings = dense.get_output_embeddings(), dense.get_input_embeddings()
    weight, other = head.weight, getattr(embeddings, "weight", None)
    says_tied = any(_config_ties(part) and _head_in_entry(part) for part in _parts_with_head(dense))
    if other is None or weight.is_meta or other.is_meta:  # offloaded: cannot be compared
        return None
    are_tied = weight is other or (says_tied and _are_equal(weight, other))
    return None if are_tied == says_tied else are_tied


def _are_equal(one: Tensor, other: Tensor) -> bool:
    same_kind = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same_kind and one.equal(other)


def _parts_with_head(dense: PreTrainedModel) -> list[PreTrainedModel]:
    """The dense model and the models in it that have its head: the configuration of any of these may tie it."""
    head, parts = dense.get_output_embeddings(), dense.modules()
    return [part for part in parts if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is head]


def _config_ties(part: PreTrainedModel) -> bool:
    return bool(getattr(part.config, "tie_word_embeddings", False))


def _head_in_entry(part: PreTrainedModel) -> bool:
    """Whether a part's class ties its head if the configuration asks for it."""
    head = part.get_output_embeddings()
    name = next(f"{name}.weight" for name, module in part.named_modules() if module is head)
    return any(re.search(f"^{pattern}", name) for pattern in part._tied_weights_keys or {})


def _tied_beside_head(part: PreTrainedModel) -> list[str]:
    """Names of tensors that a part's class ties and that are tied."""
    tensors = dict(part.named_parameters(remove_duplicate=False))
    pairs = [(name, tensors.get(name), tensors.get(source)) for name, source in (part._tied_weights_keys or {}).items()]
    return [name for name, one, other in pairs if one is not None and one is other]
