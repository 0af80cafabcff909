"""The sample that conversion takes by default: bundled texts of many kinds, and prompts for a chat model."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_topk.documents import Document, read_documents

TEXTS = Path(__file__).parent / "sample" / "texts"
PROMPTS = Path(__file__).parent / "sample" / "prompts.jsonl"


def bundled_documents(tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """The texts and, where the tokenizer has a chat template, the prompts behind them.

    Args:
        tokenizer: the model's tokenizer.
    """
    texts = read_documents(str(TEXTS))
    return [*texts, *read_documents(str(PROMPTS))] if tokenizer.chat_template else texts
