"""Copies of modules that share tensors with the original."""

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

Copied = TypeVar("Copied", bound=nn.Module)


def copy_sharing(module: Copied, shared: Iterable[object]) -> Copied:
    """A deep copy of a module, all but some objects.

    Args:
        module: a module.
        shared: what the copy has in common with it, such as its parameters.
    """
    return copy.deepcopy(module, memo={id(one): one for one in shared})
