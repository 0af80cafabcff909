"""Examples for an encoder-decoder: what it reads, text or speech, and what it is to write."""

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from . import speech
from .documents import Chat, Document, fingerprint, read_documents
from .model.dense_model import class_that_writes_text, hears_speech
from .model.errors import InputError
from .pairs import Pair
from .speech import Recording

LONGEST_SOURCE = 512  # tokens
SECONDS_HEARD = 30  # at once, where a feature extractor does not say


class Source(Protocol):
    """What an encoder reads."""

    @property
    def length(self) -> int:
        """How much of a pass it takes, in positions."""
        ...

    def together(self, sources: Sequence[Any]) -> dict[str, Tensor]:
        """Inputs of a model that reads several such sources side by side."""
        ...


@dataclass(frozen=True)
class TextSource:
    """A text to translate.

    Attributes:
        token_ids: with the special tokens that the tokenizer puts around it.
    """

    token_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Its tokens."""
        return len(self.token_ids)

    def together(self, sources: "Sequence[TextSource]") -> dict[str, Tensor]:
        """Token ids [B, T], zero where a source has ended, and the attention mask [B, T]."""
        longest = max(source.length for source in sources)
        rows = [torch.tensor(source.token_ids) for source in sources]
        padded = [F.pad(row, (0, longest - len(row))) for row in rows]
        real = [torch.arange(longest) < len(row) for row in rows]
        return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(real).long()}


@dataclass(frozen=True)
class SpeechSource:
    """Speech to transcribe; its features are made when it is heard, for they take much memory.

    Attributes:
        samples: fp32 [n].
        extractor: makes a model's features of samples.
    """

    samples: Any = field(repr=False)
    extractor: Any = field(repr=False)

    @property
    def length(self) -> int:
        """A position for each 20 ms, as Whisper's encoder has them."""
        return len(self.samples) * 50 // self.extractor.sampling_rate

    def together(self, sources: "Sequence[SpeechSource]") -> dict[str, Tensor]:
        """Features under the names that the model has for them."""
        parameters = inspect.signature(type(self.extractor).__call__).parameters
        pads_by_itself = "padding" in parameters and parameters["padding"].default not in (None, False)
        made = self.extractor(
            [source.samples for source in sources],
            sampling_rate=self.extractor.sampling_rate,
            return_tensors="pt",
            **({} if pads_by_itself else {"padding": True}),
        )
        return dict(made)


@dataclass(frozen=True)
class Example:
    """A source, and what is to be written of it.

    Attributes:
        document: number of the document that it is from.
        source: what is read.
        target_ids: what is to be written, special tokens and all; None leaves it to the model.
        target: the same as text.
        follows_prompt: whether the model is asked what the decoder begins with, as for speech, in whatever language.
    """

    document: int
    source: Source
    target_ids: tuple[int, ...] | None = None
    target: str | None = None
    follows_prompt: bool = False


@dataclass(frozen=True)
class Processor:
    """What a model that hears speech reads and writes with.

    Attributes:
        tokenizer: of what is written.
        feature_extractor: of what is heard.
    """

    tokenizer: PreTrainedTokenizerBase
    feature_extractor: Any

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Processor":
        """Load both; a processor of Transformers would be looked for by the type of the converted model.

        Args:
            name: a folder, or a repository of the Hub.
        """
        return cls(AutoTokenizer.from_pretrained(name), AutoFeatureExtractor.from_pretrained(name))


def hears(config: PreTrainedConfig) -> bool:
    """Whether a dense model hears speech with an encoder; others of that Auto class can do with text alone.

    Args:
        config: its configuration.
    """
    return config.is_encoder_decoder and hears_speech(class_that_writes_text(config).__name__)


def read_examples(
    text: str, config: PreTrainedConfig, tokenizer: Any, window_length: int, seed: int
) -> tuple[list[Example], str]:
    """Read sources, and targets where there are any.

    Args:
        text: as [`read_documents`] takes it; a folder of recordings for a model that hears speech.
        config: the dense model's configuration.
        tokenizer: its tokenizer, or its processor if it hears speech.
        window_length: tokens of a target, at most.
        seed: of the order.

    Returns:
        The examples, and a fingerprint of all that was read.

    Raises:
        InputError: when there is nothing to read that suits the model, or it has no tokenizer or feature extractor.
    """
    if tokenizer is None:
        raise InputError(
            "the sample needs a tokenizer, and the model has none: put the tokenizer's files in its folder"
        )
    if not hears(config):
        documents = read_documents(text)
        return examples_of_text(documents, tokenizer, window_length, seed), fingerprint(documents)
    extractor = getattr(tokenizer, "feature_extractor", None)
    if extractor is None:
        raise InputError(
            "speech needs a feature extractor, and the model has none: put preprocessor_config.json beside it"
        )
    seconds = getattr(extractor, "chunk_length", SECONDS_HEARD)
    recordings = speech.read_speech(text, extractor.sampling_rate, seconds)
    return examples_of_speech(recordings, extractor, tokenizer.tokenizer, seed), speech.fingerprint(recordings)


def examples_of_text(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, window_length: int, seed: int
) -> list[Example]:
    """Tokenise pairs, and the lines of plain texts, in random order.

    Args:
        documents: pairs, or texts of which each line is a source.
        tokenizer: the model's tokenizer.
        window_length: tokens of a target, at most.
        seed: of the order.

    Raises:
        InputError: when there are conversations among them.
    """
    pairs = [(number, pair) for number, document in enumerate(documents) for pair in _pairs_of(document)]
    longest = min(tokenizer.model_max_length, LONGEST_SOURCE)
    examples = []
    for number, pair in random.Random(seed).sample(pairs, len(pairs)):
        source = tokenizer(pair.source, truncation=True, max_length=longest)["input_ids"]
        target = None
        if pair.target is not None:
            target = tokenizer(text_target=pair.target, truncation=True, max_length=window_length)["input_ids"]
        examples.append(Example(number, TextSource(tuple(source)), target and tuple(target), pair.target))
    return examples


def _pairs_of(document: Document) -> list[Pair]:
    if isinstance(document, Chat):
        raise InputError("the text has conversations, and the model translates: give pairs of source and target")
    if isinstance(document, Pair):
        return [document]
    return [Pair(line.strip()) for line in document.splitlines() if line.strip()]


def examples_of_speech(
    recordings: Sequence[Recording], extractor: Any, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Example]:
    """Take recordings in random order.

    Args:
        recordings: at the extractor's rate.
        extractor: the model's feature extractor.
        tokenizer: the model's tokenizer, for transcripts.
        seed: of the order.
    """
    examples = []
    for one in random.Random(seed).sample(list(recordings), len(recordings)):
        target = None
        if one.transcript is not None:
            target = (*tokenizer(one.transcript, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
        source = SpeechSource(one.samples, extractor)
        examples.append(Example(one.file, source, target, one.transcript, follows_prompt=True))
    return examples
