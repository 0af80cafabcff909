"""The recipe's choices as options of a command."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from hf_topk.model.configuration_topk_experts import CombineType

from .recipe import Recipe


def takes_choices(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of the recipe; it receives them by name, None if not given."""
    signature = inspect.signature(command, eval_str=True)
    options = []
    for field in dataclasses.fields(Recipe):
        if (flags := field.metadata["flags"]) is None:
            continue
        what, default = field.metadata["what"], field.metadata["unset"] or field.default
        about = f"{what[0].upper()}{what[1:]}." + (f" [default: {default}]" if default is not False else "")
        kind: Any = str if field.type == CombineType else field.type
        option = typer.Option(f"--{field.name.replace('_', '-')}", *flags, help=about)
        options.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
    command.__signature__ = signature.replace(parameters=[*own[:1], *options, *own[1:]])  # type: ignore[attr-defined]
    return command
