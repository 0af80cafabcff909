"""Loads the calibration text: the recipe's, or else bundled texts of many kinds, and prompts for a chat model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_topk.documents import Document, fingerprint, read_documents
from hf_topk.examples import Example
from hf_topk.model.errors import InputError
from hf_topk.windows import KIND, Window, distinct_positions, make_windows

from .recipe import MIXED, Recipe
from .steps.generate_targets import examples_of_recipe

Sample = list[Window] | list[Example]  # of an encoder-decoder, which may have to generate the targets first
TEXTS = Path(__file__).parent / "calibration_text" / "texts"
CHAT = "chat"
PROMPTS = Path(__file__).parent / "calibration_text" / "prompts.jsonl"


def bundled_documents(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Document]]:
    """The bundled texts by kind, which is their folder, and, if the tokenizer has a chat template, the bundled prompts.

    Args:
        tokenizer: the model's tokenizer.
    """
    folders = sorted({file.parent for file in TEXTS.rglob("*.txt")})
    texts = {folder.relative_to(TEXTS).as_posix(): read_documents(str(folder)) for folder in folders}
    return texts | ({CHAT: read_documents(str(PROMPTS))} if tokenizer.chat_template else {})


def calibration_windows(tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe) -> tuple[list[Window], str]:
    """Read the calibration text of a recipe and cut it into windows.

    Returns:
        The windows, and a fingerprint of the whole text.

    Raises:
        InputError: when there is no tokenizer, or the text cannot be read.
    """
    if tokenizer is None:
        raise InputError(
            "the calibration text needs a tokenizer, and the model has none: put the tokenizer's files in its folder"
        )
    texts = bundled_documents(tokenizer) if recipe.text == MIXED else {KIND: read_documents(recipe.text)}
    documents = [document for some in texts.values() for document in some]
    kinds = [kind for kind, some in texts.items() for _ in some]
    windows = make_windows(documents, tokenizer, recipe.window_length, recipe.positions, recipe.seed)
    windows = [replace(one, kind=kinds[one.document]) for one in distinct_positions(windows)]
    return windows, fingerprint(documents)


def read_calibration_text(config: PreTrainedConfig, tokenizer: Any, recipe: Recipe) -> tuple[Sample, str]:
    """Read the calibration text of a recipe: text, pairs or speech.

    Args:
        config: the dense model's configuration.
        tokenizer: its tokenizer, or its processor if it is a speech model.
        recipe: every choice.

    Returns:
        Its windows, or the examples of an encoder-decoder, and a fingerprint of all that was read.

    Raises:
        InputError: when there is no tokenizer or feature extractor, or the text does not suit the model.
    """
    if config.is_encoder_decoder:
        return examples_of_recipe(config, tokenizer, recipe)
    return calibration_windows(tokenizer, recipe)


def check_windows(windows: list[Window], vocab_size: int, hidden_size: int) -> None:
    """Refuse calibration text with fewer positions than hidden dimensions, or with ids outside the head.

    Raises:
        InputError: in either case.
    """
    positions = sum(window.positions for window in windows)
    if positions < hidden_size:
        raise InputError(
            f"the calibration text has {positions} positions, fewer than the {hidden_size} dimensions of a hidden "
            "state: give more text, or raise `positions`"
        )
    largest = max(max(window.token_ids) for window in windows)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives token id {largest}, but the head has {vocab_size} rows: "
            "the tokenizer is not this model's"
        )
