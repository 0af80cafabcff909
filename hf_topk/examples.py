"""Examples for an encoder-decoder: sources, which are text or speech, and their targets."""

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
from .model.dense_model import dense_class_of, is_speech_class
from .model.errors import InputError
from .pairs import Pair
from .speech import Recording

LONGEST_SOURCE = 512  # tokens
SECONDS_HEARD = 30  # of a recording, if the feature extractor sets no limit


class Source(Protocol):
    """The input of an encoder."""

    @property
    def length(self) -> int:
        """Size in a forward pass, in positions."""
        ...

    def together(self, sources: Sequence[Any]) -> dict[str, Tensor]:
        """Model inputs for a batch of such sources."""
        ...


@dataclass(frozen=True)
class TextSource:
    """A text to translate.

    Attributes:
        token_ids: with the tokenizer's special tokens.
    """

    token_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)

    def together(self, sources: "Sequence[TextSource]") -> dict[str, Tensor]:
        """Token ids [B, T], padded with zeros, and the attention mask [B, T]."""
        longest = max(source.length for source in sources)
        rows = [torch.tensor(source.token_ids) for source in sources]
        padded = [F.pad(row, (0, longest - len(row))) for row in rows]
        real = [torch.arange(longest) < len(row) for row in rows]
        return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(real).long()}


@dataclass(frozen=True)
class SpeechSource:
    """Speech to transcribe; features are computed per batch, as they take much RAM.

    Attributes:
        samples: mono, fp32 [n].
        extractor: the model's feature extractor.
    """

    samples: Any = field(repr=False)
    extractor: Any = field(repr=False)

    @property
    def length(self) -> int:
        """One position per 20 ms, as in Whisper's encoder."""
        return len(self.samples) * 50 // self.extractor.sampling_rate

    def together(self, sources: "Sequence[SpeechSource]") -> dict[str, Tensor]:
        """Features, by the names of the model's arguments."""
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
    """A source and its target.

    Attributes:
        document: index of its document.
        source: the encoder's input.
        target_ids: token ids of the target, with special tokens; None to let the model generate it.
        target: its text.
        follows_prompt: whether the model chooses the decoder's first tokens, such as the language in speech.
    """

    document: int
    source: Source
    target_ids: tuple[int, ...] | None = None
    target: str | None = None
    follows_prompt: bool = False


@dataclass(frozen=True)
class Processor:
    """The tokenizer and feature extractor of a speech model.

    Attributes:
        tokenizer: for transcripts.
        feature_extractor: for recordings.
    """

    tokenizer: PreTrainedTokenizerBase
    feature_extractor: Any

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Processor":
        """Load both; Transformers would look up a processor by the converted model's type, and find none.

        Args:
            name: a folder, or a repository on the Hub.
        """
        return cls(AutoTokenizer.from_pretrained(name), AutoFeatureExtractor.from_pretrained(name))


def is_speech_model(config: PreTrainedConfig) -> bool:
    """Whether a dense model is an encoder-decoder for speech; others of that Auto class can run on text alone.

    Args:
        config: its configuration.
    """
    return config.is_encoder_decoder and is_speech_class(dense_class_of(config).__name__)


def read_examples(
    text: str, config: PreTrainedConfig, tokenizer: Any, window_length: int, seed: int
) -> tuple[list[Example], str]:
    """Read sources, with targets if there are any.

    Args:
        text: a source as in [`read_documents`], or a folder of recordings for a speech model.
        config: the dense model's configuration.
        tokenizer: its tokenizer, or its processor if it is a speech model.
        window_length: tokens of a target, at most.
        seed: of the order.

    Returns:
        The examples, and a fingerprint of the text or recordings.

    Raises:
        InputError: when the text does not suit the model, or the model has no tokenizer or feature extractor.
    """
    if tokenizer is None:
        raise InputError("the text needs a tokenizer, and the model has none: put the tokenizer's files in its folder")
    if not is_speech_model(config):
        documents = read_documents(text)
        return examples_of_text(documents, tokenizer, window_length, seed), fingerprint(documents)
    extractor = getattr(tokenizer, "feature_extractor", None)
    if extractor is None:
        raise InputError(
            "speech needs a feature extractor, and the model has none: put preprocessor_config.json in its folder"
        )
    seconds = getattr(extractor, "chunk_length", SECONDS_HEARD)
    recordings = speech.read_speech(text, extractor.sampling_rate, seconds)
    return examples_of_speech(recordings, extractor, tokenizer.tokenizer, seed), speech.fingerprint(recordings)


def examples_of_text(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, window_length: int, seed: int
) -> list[Example]:
    """Tokenise pairs, and the lines of plain text, in random order.

    Args:
        documents: pairs, or texts whose lines are sources.
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
        raise InputError("the text has conversations, and this is a translation model: give pairs of source and target")
    if isinstance(document, Pair):
        return [document]
    return [Pair(line.strip()) for line in document.splitlines() if line.strip()]


def examples_of_speech(
    recordings: Sequence[Recording], extractor: Any, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Example]:
    """Make examples of recordings, in random order.

    Args:
        recordings: at the extractor's sampling rate.
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
