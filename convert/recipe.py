"""The recipe: every choice of a conversion in one dataclass, readable from and writable to one YAML file."""

import dataclasses
import difflib
import math
import textwrap
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from hf_topk.model.configuration_topk_experts import CombineType
from hf_topk.model.errors import InputError, one_line

MIXED = "mixed"
RECIPE_FILE = "recipe.yaml"
ALWAYS_ON = 64
LARGEST_SHARE_ALWAYS_ON = 1 / 32  # of the vocabulary; limits small ones
TARGET_AGREEMENT = 0.995  # unless it or k is given
ROUTER_RANK, TAIL_RANK = 384, 288  # the largest that are tried, and those that k gets where it is given


def _choice(default: Any, what: str, *, unset: str | None = None, flags: tuple[str, ...] | None = None) -> Any:
    """A field of the recipe, with the text of its documentation and of its command-line option.

    Args:
        default: the default value.
        what: a description.
        unset: the meaning of None.
        flags: further names of its command-line option, possibly none; None if it has no option.
    """
    return dataclasses.field(default=default, metadata={"what": what, "unset": unset, "flags": flags})


def _documented(recipe: type) -> type:
    """Add the fields to the docstring of the class."""
    lines = []
    for field in dataclasses.fields(recipe):
        unset = f" None: {field.metadata['unset']}." if field.metadata["unset"] else ""
        about = f"{field.name}: {field.metadata['what']}.{unset}"
        lines.append(textwrap.fill(about, 120, initial_indent=" " * 8, subsequent_indent=" " * 12))
    recipe.__doc__ = f"{recipe.__doc__}\n    Attributes:\n" + "\n".join(lines)
    return recipe


@_documented
@strict
@dataclasses.dataclass(kw_only=True)
class Recipe:
    """Every choice of a conversion.

    Raises:
        StrictDataclassError: when a value is of a wrong type or out of range; [`Recipe.from_dict`] says so in an
            `InputError`.

    Examples:
        >>> from hf_topk.convert import Recipe
        >>> recipe = Recipe(text="books/", target_agreement=0.998)
        >>> Recipe.from_dict({"text": "books/", "target_agreement": 0.998}) == recipe
        True
        >>> Recipe.from_dict({"seeds": 1})
        Traceback (most recent call last):
        hf_topk.model.errors.InputError: unknown recipe key 'seeds': did you mean 'seed'?
    """

    text: str = _choice(
        MIXED,
        "calibration text to learn from: a .txt, .md, .jsonl, .json, .csv or .parquet file, a folder, the name of a "
        "`datasets` data set, or 'mixed': bundled texts of many kinds, and prompts for models with a chat template",
        flags=(),
    )
    positions: int = _choice(40_000, "tokens of the calibration text to use", flags=())
    window_length: int = _choice(256, "tokens that the model reads in one forward pass")
    held_out: float = _choice(
        0.2,
        "share of the documents of each kind, at least 4 or a third, kept back to measure on, above 0 and below 1",
    )
    expert_size: int = _choice(16, "tokens in an expert (S)", flags=())
    num_experts_per_tok: int | None = _choice(
        None,
        "experts picked for a position (k): more agree better, fewer are faster",
        unset="chosen for the target",
        flags=("-k",),
    )
    target_agreement: float | None = _choice(
        None,
        "read the fewest bytes that agree with the dense head this often on held-out documents of the calibration "
        "text, as a 95 % lower bound",
        unset="0.995, or what comes nearest",
        flags=(),
    )
    max_bytes_read: float | None = _choice(
        None,
        "reach the target with this share of the dense head's bytes, such as 0.1, or not at all",
        unset="any",
        flags=(),
    )
    allow_below_target: bool = _choice(False, "convert even if the target is not reached", flags=())
    num_always_on: int | None = _choice(
        None,
        "tokens scored at every position (A), the special ones first; 0: none, not even those that end a text",
        unset="about 64",
        flags=(),
    )
    router_rank: int | None = _choice(
        None, "dimensions kept to score an expert, at 3 per byte", unset="chosen for the target", flags=()
    )
    tail_rank: int | None = _choice(
        None, "dimensions kept to screen a token, at 3 per byte", unset="chosen for the target", flags=()
    )
    num_rescored: int | None = _choice(
        None, "tokens of the picked experts that get exact logits (R)", unset="chosen for the target"
    )
    combine: CombineType = _choice("exact", "how scored logits are made: exact, router or learned", flags=())  # noqa: RUF009
    sparse_max_positions: int | None = _choice(
        None,
        'most positions of a forward pass that head mode "auto" runs sparse',
        unset="measured where the model runs",
    )
    distill_steps: int = _choice(300, "training steps of the router after its closed-form fit")
    batch_size: int = _choice(256, "positions in one training step")
    learning_rate: float = _choice(1e-3, "of the first training step; decays to zero along a cosine")
    seed: int = _choice(0, "seed of all random choices", flags=())

    def validate_ranges(self) -> None:
        """Check each value by itself.

        Raises:
            ValueError: when one is out of range.
        """
        for name in ("positions", "expert_size", "distill_steps", "batch_size"):
            _at_least(name, getattr(self, name), 1)
        for name in ("num_experts_per_tok", "num_rescored", "router_rank", "tail_rank"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("window_length", self.window_length, 2)
        _at_least("sparse_max_positions", self.sparse_max_positions or 0, 0)
        _at_least("num_always_on", self.num_always_on or 0, 0)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, must be from 0 to 2**63 - 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, must be above 0 and below 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}, must be above 0")
        for name in ("target_agreement", "max_bytes_read"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} is {share}, must be a share above 0 and below 1, such as 0.995")
        if self.target_agreement is None and (self.max_bytes_read is not None or self.allow_below_target):
            raise ValueError("max_bytes_read and allow_below_target need a target_agreement")

    @classmethod
    def from_dict(cls, choices: dict[str, Any]) -> Self:
        """Make a recipe from its choices; those left out keep their defaults.

        Args:
            choices: values by name.

        Raises:
            InputError: when a name is unknown or a value is not allowed; suggests the nearest one.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in choices:
            if name not in names:
                raise InputError(f"unknown recipe key '{name}'{_did_you_mean(name, names)}")
        for name, allowed in _ALLOWED.items():
            value = choices.get(name, allowed[0])
            if value not in allowed:
                raise InputError(f"unknown {name} '{value}'{_did_you_mean(str(value), allowed)}")
        try:
            return cls(**{name: _as_float(value) if name in _FLOATS else value for name, value in choices.items()})
        except StrictDataclassError as error:
            raise InputError(f"the recipe is not valid: {one_line(error.__cause__ or error)}") from error

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a recipe from a YAML file.

        Raises:
            InputError: when the file is missing, is no YAML mapping, or holds a wrong choice.
        """
        return cls.from_dict(read_yaml(path))

    def to_dict(self) -> dict[str, Any]:
        """Every choice by name."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Every choice as YAML, in the documented order."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def resolve(self, vocab_size: int, longest_window: int | None = None) -> "ResolvedRecipe":
        """Fill in the choices that depend on the dense model.

        Args:
            vocab_size: V, the rows of the head.
            longest_window: most tokens of a forward pass of the model; None if unlimited.

        Returns:
            A recipe that leaves open only k, R and the ranks.

        Raises:
            InputError: when the sizes do not fit the vocabulary.
        """
        if self.expert_size > vocab_size:
            raise InputError(
                f"expert_size is {self.expert_size}, more than the vocabulary of {vocab_size}: choose a smaller one"
            )
        always_on = self.num_always_on
        if always_on is None:
            always_on = _default_always_on(vocab_size, self.expert_size)
        if always_on >= vocab_size:
            raise InputError(
                f"num_always_on is {always_on}, which leaves none of {vocab_size} tokens to route: choose fewer"
            )
        choices = {
            **self.to_dict(),
            "window_length": min(self.window_length, longest_window or self.window_length),
            "num_always_on": always_on,
        }
        resolved = ResolvedRecipe(**choices, vocab_size=vocab_size)
        chosen = self.num_experts_per_tok
        if chosen is not None and chosen > resolved.num_experts:
            raise InputError(
                f"num_experts_per_tok is {chosen}, but there are only {resolved.num_experts} experts of "
                f"{self.expert_size}: choose fewer, or a smaller expert_size"
            )
        return resolved


@strict
@dataclasses.dataclass(kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe that was checked against a dense model, and leaves open only k, R and the ranks.

    Attributes:
        num_always_on: A.
        vocab_size: V, the rows of the head.
    """

    num_always_on: int = 0
    vocab_size: int

    @property
    def num_experts(self) -> int:
        """M."""
        return math.ceil((self.vocab_size - self.num_always_on) / self.expert_size)

    def to_dict(self) -> dict[str, Any]:
        """Every choice by name, without the vocabulary size."""
        choices = super().to_dict()
        del choices["vocab_size"]
        return choices


def public_name(text: str) -> str:
    """The name of the calibration text without its parent folders; a data set's name as it is.

    Args:
        text: as in the recipe.
    """
    path = Path(text).expanduser()
    return path.name if path.is_absolute() or path.exists() else text


def calibration_text_name(text: str) -> str:
    """The name of the calibration text for people.

    Args:
        text: as in the recipe.
    """
    return "the bundled texts" if text == MIXED else public_name(text)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        InputError: when the file is missing or is no YAML mapping.
    """
    try:
        choices = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} is not valid YAML: {one_line(error)}") from error
    if choices is None:
        return {}
    if not isinstance(choices, dict):
        raise InputError(f"the recipe {path} is not a mapping of choices: write lines such as `expert_size: 16`")
    return {str(name): value for name, value in choices.items()}


def _default_always_on(vocab_size: int, expert_size: int) -> int:
    """256, or less in a small vocabulary, plus the remainder that would leave an expert incomplete."""
    wanted = min(ALWAYS_ON, int(vocab_size * LARGEST_SHARE_ALWAYS_ON))
    over = (vocab_size - wanted) % expert_size
    return wanted + over if wanted + over < vocab_size else wanted


def _at_least(name: str, value: float, least: int) -> None:
    if isinstance(value, bool):  # older versions of huggingface_hub accept it as a whole number
        raise ValueError(f"{name} is {value}, must be a number")
    if value < least:
        raise ValueError(f"{name} is {value}, must be at least {least}")


def _as_float(value: Any) -> Any:
    """A whole number as a float, and `1e-3`, which YAML 1.1 reads as a string."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f": did you mean '{near[0]}'?" if near else f": choose one of {', '.join(known)}"


_FLOATS = [field.name for field in dataclasses.fields(Recipe) if field.type in (float, float | None)]
_ALLOWED = {
    "combine": list(get_args(CombineType)),
}
