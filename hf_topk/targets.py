"""Windows of an encoder-decoder: the decoder's positions in a target, with the encoder's source."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .examples import Example, Source, is_speech_model, recorded_sources
from .model.errors import InputError
from .progress import progress
from .windows import Window

SOURCES_AT_ONCE = 16  # batch size when the model generates targets
ROOM_FOR_PROMPT = 8  # tokens of the decoder's prompt, at most, such as language and task


@dataclass(frozen=True)
class TargetWindow(Window):
    """The decoder's inputs for a target: its prompt, and the target's tokens but the last.

    The prompt fixes the next token of all positions before `first`.

    Attributes:
        source: the encoder's input.
        last_token: the target's last token, which follows the last position.
    """

    source: Source
    last_token: int

    @property
    def length(self) -> int:
        """Size in a forward pass, in positions of encoder and decoder."""
        return len(self.token_ids) + self.source.length

    @property
    def followers(self) -> tuple[int, ...]:
        """The next token of each position."""
        return (*self.token_ids[self.first + 1 :], self.last_token)


def inputs_of(windows: Sequence[Window], model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
    """The model's arguments for one forward pass over windows, padded on the right.

    Args:
        windows: of one kind.
        model: dense or converted.

    Returns:
        The arguments, with token ids [B, T] int64, and a mask of the positions that count, [B, T] bool.
    """
    longest = max(len(window.token_ids) for window in windows)
    token_ids = torch.zeros(len(windows), longest, dtype=torch.long)
    real = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        token_ids[row, : len(window.token_ids)] = torch.tensor(window.token_ids)
        real[row, len(window.token_ids) - window.positions : len(window.token_ids)] = True
    token_ids, real = token_ids.to(model.device), real.to(model.device)
    sources = [window.source for window in windows if isinstance(window, TargetWindow)]
    return ({**read(sources, model), "decoder_input_ids": token_ids} if sources else {"input_ids": token_ids}), real


def read(sources: Sequence[Source], model: PreTrainedModel) -> dict[str, Tensor]:
    """The encoder's arguments for a batch of sources of one kind, on the model's device and in its dtype."""
    inputs = sources[0].together(sources)
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def prompt_inputs(prompt: str, model: PreTrainedModel, tokenizer: Any) -> list[dict[str, Any]]:
    """The model's arguments for a prompt: a text, or for a speech model a recording, in pieces if it is long.

    Args:
        prompt: a text to continue or to translate, or the file of a recording.
        model: a converted model.
        tokenizer: its tokenizer, or its processor if it is a speech model.

    Raises:
        InputError: when the prompt is empty, or there is no such recording.
    """
    if is_speech_model(model.config.dense_config):
        return [read([source], model) for source in recorded_sources(prompt, tokenizer.feature_extractor)]
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not prompt or inputs["input_ids"].shape[1] == 0:
        raise InputError("the prompt is empty: give a text")
    return [dict(inputs)]


def windows_of_examples(
    model: PreTrainedModel,
    examples: Sequence[Example],
    window_length: int,
    positions: int | None = None,
    run: Callable[..., Iterator[Any]] | None = None,
) -> list[TargetWindow | None]:
    """Make windows of examples; the model generates missing targets greedily.

    Args:
        model: dense or converted.
        examples: sources with or without targets.
        window_length: tokens of a target, at most.
        positions: number wanted; None takes all examples.
        run: distributes batches to workers, as [`Processes.run`] does.

    Returns:
        A window per example, in order, until there are enough positions; None for an empty target.
    """
    batches = list(_batches(examples))
    calls = ((batch, window_length) for batch in batches)
    results = (windows_of_batch(model, *call) for call in calls) if run is None else run(windows_of_batch, model, calls)
    windows: list[TargetWindow | None] = []
    left = positions
    with progress("Generating targets", len(examples), "sources") as advance:
        for batch, made in zip(batches, results, strict=True):
            windows += made
            advance(len(batch))
            if left is not None and (left := left - sum(one.positions for one in made if one)) <= 0:
                break
    return windows


def not_empty(windows: Sequence[TargetWindow | None]) -> list[Window]:
    """The windows of the targets that are not empty.

    Args:
        windows: as [`windows_of_examples`] returns them.

    Raises:
        InputError: when all targets are empty.
    """
    found: list[Window] = [one for one in windows if one is not None]
    if not found:
        raise InputError("the model generates nothing for these sources: give others, or targets as well")
    return found


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Batches of examples that either all have targets, or none."""
    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) == SOURCES_AT_ONCE or (batch[0].target_ids is None) != (example.target_ids is None)):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


@torch.inference_mode()
def windows_of_batch(
    model: PreTrainedModel, examples: Sequence[Example], window_length: int
) -> list[TargetWindow | None]:
    """Make windows of a batch.

    Args:
        model: dense or converted.
        examples: which all have targets, or none.
        window_length: tokens of a target, at most.

    Returns:
        A window per example; None for an empty target.
    """
    if examples[0].target_ids is None:
        rows = generate_targets(model, examples, window_length)
    elif examples[0].follows_prompt:
        prompts = generate_targets(model, examples, 1)
        rows = [
            ((*tokens[: first + 1], *(one.target_ids or ())[:window_length]), first)
            for (tokens, first), one in zip(prompts, examples, strict=True)
        ]
    else:
        rows = [((*_beginning(model, one.target_ids or ()), *(one.target_ids or ())[-1:]), 0) for one in examples]
    return [
        TargetWindow(one.document, tokens[:-1], one.source, tokens[-1], first=first)
        if len(tokens) > first + 1
        else None
        for (tokens, first), one in zip(rows, examples, strict=True)
    ]


def _beginning(model: Any, target_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The decoder's inputs for a target: its start token, and all tokens but the last."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return tuple(model.prepare_decoder_input_ids_from_labels(torch.tensor([target_ids]))[0].tolist())
    return (model.generation_config.decoder_start_token_id, *target_ids[:-1])


def generate_targets(
    model: Any, examples: Sequence[Example], new_tokens: int, **choices: Any
) -> list[tuple[tuple[int, ...], int]]:
    """Generate targets for a batch of sources, greedily.

    Args:
        model: dense or converted.
        examples: sources; their targets are ignored.
        new_tokens: to generate, at most.
        **choices: further arguments of `generate`.

    Returns:
        For each source the decoder's token ids up to the end token, with the prompt, and the prompt's last position.
    """
    inputs = read([one.source for one in examples], model)
    prompt = _SeesPrompt()
    choices = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, **choices}
    if "force_unique_generate_call" in inspect.signature(_own_generate(model)).parameters:
        choices["force_unique_generate_call"] = True  # otherwise Whisper removes its prompt
    written = model.generate(**inputs, **choices, logits_processor=LogitsProcessorList([prompt]))
    ends = model.generation_config.eos_token_id
    ends = {*ends} if isinstance(ends, list) else {ends}
    rows = []
    for row in written.tolist():
        end = next((place for place in range(prompt.length, len(row)) if row[place] in ends), len(row) - 1)
        rows.append((tuple(row[: end + 1]), prompt.length - 1))
    return rows


def _own_generate(model: Any) -> Callable[..., Any]:
    """The `generate` that a model runs; a converted one runs that of the dense model's class."""
    return type(getattr(model, "base", model)).generate


class _SeesPrompt(LogitsProcessor):
    """Records the length of the decoder's prompt, and changes nothing."""

    length = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.length = self.length or input_ids.shape[1]
        return scores
