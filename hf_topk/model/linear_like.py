"""Converts layers that compute W h + b, such as quantised ones, to plain linear layers."""

from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, one_line

# Relative error allowed between the logits of a layer and of its plain copy; rounding inputs to int8 causes 1 %.
TOLERANCE = 0.02


def as_linear(layer: nn.Module, head: nn.Linear) -> nn.Linear:
    """A layer's weight and bias, as a plain linear layer over hidden states.

    Args:
        layer: a linear layer, perhaps quantised or of a custom class.
        head: the head, with d inputs; a copy gets its dtype and device.

    Returns:
        The layer itself if it is plain, or else a plain copy with rows [V', d], computed from its outputs.

    Raises:
        InputError: when the layer has no `weight`, does not have d inputs, or does not compute W h + b.
    """
    name, hidden_size = type(layer).__name__, head.in_features
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise InputError(f"this {name} has no `weight` to take the experts' rows from: set a linear layer as the head")
    if not (isinstance(layer, nn.Linear) and _is_plain(layer)):
        return _read_out(layer, head)
    if weight.shape[1] != hidden_size:
        raise InputError(
            f"this {name} has {weight.shape[1]} inputs, but hidden states have size {hidden_size}: set a linear layer "
            "with as many inputs as the head"
        )
    return layer


def _is_plain(layer: nn.Linear) -> bool:
    """Whether rows can be read from the weight: it is in floats, and the class computes only W h + b."""
    holds_floats = type(layer.weight) in (Tensor, nn.Parameter) and layer.weight.is_floating_point()
    return holds_floats and type(layer).forward is nn.Linear.forward


@torch.no_grad()
def _read_out(layer: nn.Module, head: nn.Linear) -> nn.Linear:
    name, size = type(layer).__name__, head.in_features
    like: dict[str, Any] = {"dtype": head.weight.dtype, "device": head.weight.device}
    probe = torch.linspace(-1, 1, size, **like).unsqueeze(0)
    try:
        bias, columns, logits = (layer(states) for states in (torch.zeros_like(probe), torch.eye(size, **like), probe))
        rows = (columns - bias).t()
        is_linear = _are_close(logits, nn.functional.linear(probe, rows, bias[0]))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"this {name} cannot compute logits from hidden states of size {size} ({one_line(error)}): "
            "set a linear layer as the head"
        ) from error
    if not is_linear:
        raise InputError(f"this {name} does not compute W h + b: set a linear layer as the head")
    plain = nn.Linear(size, len(rows), bias=getattr(layer, "bias", None) is not None, **like)
    plain.weight.copy_(rows)
    if plain.bias is not None:
        plain.bias.copy_(bias[0])
    return plain.requires_grad_(head.weight.requires_grad)


def _are_close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).float().norm() <= TOLERANCE * other.float().norm())
