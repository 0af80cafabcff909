"""The sample of a model with an encoder: sources, and targets that are given or that the model writes itself."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_topk.examples import Example, hears, read_examples
from hf_topk.model.errors import InputError
from hf_topk.targets import TargetWindow, write_targets
from hf_topk.windows import Window

from ..processes import ALONE, Processes
from ..recipe import MIXED, Recipe
from .hidden_states import read_record, write_record

TARGETS_FILE = "targets.json"


def sample_from_examples(config: PreTrainedConfig, tokenizer: Any, recipe: Recipe) -> tuple[list[Example], str]:
    """Read the sources, and the targets where there are any, that a recipe names.

    Args:
        config: the dense model's configuration.
        tokenizer: its tokenizer, or its processor if it hears speech.
        recipe: every choice.

    Returns:
        The examples, and a fingerprint of all that was read.

    Raises:
        InputError: when the recipe names none, or nothing that suits the model.
    """
    if recipe.text == MIXED:
        give = (
            "a folder of .wav or .flac files, with the transcript of NAME.wav in NAME.txt where there is one"
            if hears(config)
            else 'a .jsonl file of {"source": "...", "target": "..."}, or source text alone, which it translates itself'
        )
        raise InputError(f"a model with an encoder learns from what it reads and writes: give --text, {give}")
    return read_examples(recipe.text, config, tokenizer, recipe.window_length, recipe.seed)


def windows_of(
    model: PreTrainedModel,
    sample: list[Window] | list[Example],
    recipe: Recipe,
    folder: Path,
    processes: Processes = ALONE,
) -> list[Window]:
    """The windows of a sample; those of examples have the targets that the model writes where none is given.

    Args:
        model: the dense model.
        sample: windows, which stay as they are, or sources with targets or without.
        recipe: every choice.
        folder: where targets are kept once they are written, and found again.
        processes: what the writing is dealt out to.

    Raises:
        InputError: when nothing is written.
    """
    examples = [one for one in sample if isinstance(one, Example)]
    if not examples:
        return [one for one in sample if isinstance(one, Window)]
    kept = read_record(folder / TARGETS_FILE).get("targets")
    if kept is None:
        windows = write_targets(model, examples, recipe.window_length, recipe.positions, processes.run)
        folder.mkdir(parents=True, exist_ok=True)
        entries = [one and [one.first, one.last_token, one.token_ids] for one in windows]
        write_record(folder / TARGETS_FILE, {"targets": entries})
    else:
        windows = [
            entry and TargetWindow(one.document, tuple(entry[2]), one.source, first=entry[0], last_token=entry[1])
            for one, entry in zip(examples, kept, strict=False)
        ]
    whole: list[Window] = [one for one in windows if one is not None]
    if not whole:
        raise InputError("the model writes nothing of these sources: give others, or targets as well")
    return whole
