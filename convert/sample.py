"""The calibration text: what a recipe names, or else bundled texts of many kinds, and prompts for a chat model."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_topk.documents import Document, fingerprint, read_documents
from hf_topk.model.errors import InputError
from hf_topk.windows import Window, make_windows

from .recipe import MIXED, Recipe

TEXTS = Path(__file__).parent / "calibration_text" / "texts"
PROMPTS = Path(__file__).parent / "calibration_text" / "prompts.jsonl"


def bundled_documents(tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """The texts and, where the tokenizer has a chat template, the prompts behind them.

    Args:
        tokenizer: the model's tokenizer.
    """
    texts = read_documents(str(TEXTS))
    return [*texts, *read_documents(str(PROMPTS))] if tokenizer.chat_template else texts


def sample_from_text(tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe) -> tuple[list[Window], str]:
    """Read and cut the sample text that a recipe names.

    Returns:
        Its windows, and a fingerprint of the whole text.

    Raises:
        InputError: when there is no tokenizer, or the text cannot be read.
    """
    if tokenizer is None:
        raise InputError(
            "sample text needs a tokenizer, and the model has none: put the tokenizer's files in its folder"
        )
    documents = bundled_documents(tokenizer) if recipe.text == MIXED else read_documents(recipe.text)
    windows = make_windows(documents, tokenizer, recipe.window_length, recipe.positions, recipe.seed)
    return windows, fingerprint(documents)


def check_sample(windows: list[Window], vocab_size: int, hidden_size: int) -> None:
    """Refuse a sample that is too short for the size of a hidden state, or has ids that the head does not.

    Raises:
        InputError: when it is either.
    """
    positions = sum(len(window.token_ids) for window in windows)
    if positions < hidden_size:
        raise InputError(
            f"the sample has {positions} positions, fewer than the {hidden_size} numbers of a hidden state, which is "
            "too few to learn from: give more text, or raise `positions`"
        )
    largest = max(max(window.token_ids) for window in windows)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives token id {largest}, but the head has {vocab_size} rows: "
            "the tokenizer is not this model's"
        )
