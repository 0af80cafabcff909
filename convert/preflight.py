"""Checks of a conversion before any weights are read or anything is written."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_topk.examples import Processor, is_speech_model
from hf_topk.model.configuration_topk_experts import TopKExpertsConfig
from hf_topk.model.dense_model import generates_text, name_of_head, random_dense_model
from hf_topk.model.errors import InputError, one_line
from hf_topk.windows import Window, readable_length

from .hub import Destination, check_destination
from .load_calibration_text import Sample, check_windows, read_calibration_text
from .recipe import Recipe, ResolvedRecipe
from .source import Source, find_folder, open_source, read_json
from .steps.special_tokens import check_ends_always_on, end_ids

SMALLEST_SHARE_OF_HEAD = 0.5  # of the head's rows: fewer tokens mean another model's tokenizer
SHARE_ADDED = 0.2  # of the head's bytes: more than any router and tail of usual sizes add
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Plan:
    """A conversion that has passed all checks.

    Attributes:
        source: the dense checkpoint.
        out: the folder to write.
        recipe: every choice, with none left open.
        tokenizer: the model's, its processor if it is a speech model, or None if it has none.
        windows: of the calibration text, or the examples of a model with an encoder.
        text_fingerprint: of the calibration text.
        destination: on the Hub, with its owner; None if the folder is not uploaded.
    """

    source: Source
    out: Path
    recipe: ResolvedRecipe
    tokenizer: Any
    windows: Sample
    text_fingerprint: str
    destination: Destination | None


def preflight(
    model: str | None,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    destination: Destination | None = None,
) -> Plan:
    """Check a conversion.

    Args:
        model: a folder, a repository of the Hub, or None for the bundled demo model.
        out: the folder to write.
        recipe: every choice.
        overwrite: whether `out` may be an earlier converted model.
        destination: on the Hub; None if the folder is not uploaded.

    Raises:
        InputError: when a check fails; nothing is written then.
    """
    folder = find_folder(model)
    name = "the bundled demo model" if model is None else model
    config = _dense_config(name, folder)
    _check_out(Path(out), folder, overwrite)
    if destination:
        destination = check_destination(destination)
    vocab_size, hidden_size = _head_shape(config)
    source = open_source(str(folder) if model is None else model, folder)
    resolved = recipe.resolve(vocab_size, readable_length(config, recipe.window_length))
    check_ends_always_on(resolved.num_always_on, _end_ids(config, folder), vocab_size)
    tokenizer = load_processor(source.folder) if is_speech_model(config) else load_tokenizer(source.folder)
    if tokenizer is not None:
        _check_tokenizer(getattr(tokenizer, "tokenizer", tokenizer), vocab_size)
    windows, text_fingerprint = read_calibration_text(config, tokenizer, resolved)
    if not config.is_encoder_decoder:  # which may have to generate the targets first
        check_windows(cast(list[Window], windows), vocab_size, hidden_size)
    _check_disk(Path(out), source, vocab_size, hidden_size, resolved.positions)
    return Plan(source, Path(out), resolved, tokenizer, windows, text_fingerprint, destination)


def _dense_config(name: str, folder: Path) -> PreTrainedConfig:
    """The configuration of a dense causal language model; raises InputError for any other."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} is not a model: there is no config.json in {folder}")
    choices = read_json(folder / "config.json")
    model_type = choices.get("model_type")
    if model_type == TopKExpertsConfig.model_type:
        raise InputError(f"{name} is already converted: give the dense model it was made from")
    if "quantization_config" in choices:
        raise InputError(
            f"{name} is quantised: give the checkpoint it was made from, in bfloat16 or another float type"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise InputError(
            f"Transformers cannot read the configuration of {name} (model type '{model_type}'): {one_line(error)}"
        ) from error
    _check_class(name, config)
    return config


def _check_class(name: str, config: PreTrainedConfig) -> None:
    architectures = config.architectures or []
    if architectures and not any(map(generates_text, architectures)):
        raise InputError(
            f"{name} is a {architectures[0]}, which has no single vocabulary head that writes text: "
            "choose a causal language model (a ...ForCausalLM), or one that translates or transcribes"
        )


def _head_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """V and d, from a model on the meta device."""
    with torch.device("meta"):
        dense = random_dense_model(config)
    weight = cast(torch.Tensor, dense.get_submodule(name_of_head(dense)).weight)
    return weight.shape[0], weight.shape[1]


def _end_ids(config: PreTrainedConfig, folder: Path) -> list[int]:
    """Ids that end a text, as the loaded model will have them."""
    try:
        return end_ids(GenerationConfig.from_pretrained(folder))
    except OSError:  # missing or unreadable
        return end_ids(GenerationConfig.from_model_config(config))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint; None if it has none.

    Raises:
        InputError: when it cannot be read.
    """
    return _load_beside(folder, AutoTokenizer)


def load_processor(folder: Path) -> Any:
    """Load the feature extractor and tokenizer of a speech model's checkpoint; None if it has none.

    Raises:
        InputError: when they cannot be read.
    """
    return _load_beside(folder, Processor)


def _load_beside(folder: Path, auto_class: Any) -> Any:
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    try:
        return auto_class.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"the tokenizer in {folder} cannot be read ({one_line(error)}): fetch the model again"
        ) from error


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    # A few added tokens may have no row in the head (Gemma 3's image token), and heads may be padded.
    tokens = tokenizer.vocab_size
    if not SMALLEST_SHARE_OF_HEAD * vocab_size <= max(tokens, len(tokenizer)) or tokens > vocab_size:
        raise InputError(
            f"the tokenizer has {tokens} tokens but the head has {vocab_size} rows, so it is another model's: "
            "put the model's own tokenizer in its folder"
        )


def _check_out(out: Path, folder: Path, overwrite: bool) -> None:
    if out.resolve() == folder.resolve():
        raise InputError(f"the output folder {out} is the model's own folder: choose another")
    if out.exists() or out.is_symlink():
        _check_existing(out, overwrite)
    parent = _existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {parent}: choose an output folder elsewhere, or change its permissions")


def _check_existing(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise InputError(f"{out} exists: choose another output folder, or give --overwrite")
    if not out.is_dir() or out.is_symlink():
        raise InputError(f"{out} is not a folder: choose another output folder")
    config = out / "config.json"
    is_ours = config.is_file() and read_json(config).get("model_type") == TopKExpertsConfig.model_type
    if any(out.iterdir()) and not is_ours:
        raise InputError(f"{out} is not a converted model and is not overwritten: choose another folder")


def _check_disk(out: Path, source: Source, vocab_size: int, hidden_size: int, positions: int) -> None:
    itemsize = 4  # at most
    states = positions * hidden_size * itemsize
    needed = source.nbytes() + int(SHARE_ADDED * vocab_size * hidden_size * itemsize) + states
    parent = _existing_parent(out)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"the disk of {parent} has {free / 2**20:,.0f} MiB left and the conversion needs about "
            f"{needed / 2**20:,.0f}: make room, or choose an output folder elsewhere"
        )


def _existing_parent(out: Path) -> Path:
    """The nearest existing parent of `out`."""
    return next(parent for parent in out.resolve().parents if parent.exists())
