"""What an encoder-decoder writes, as windows: positions of its decoder, with what its encoder reads."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .examples import Example, Source
from .progress import progress
from .windows import Window

SOURCES_AT_ONCE = 16  # that a model writes of side by side
ROOM_FOR_PROMPT = 8  # tokens that a decoder may begin with, such as the language and the task


@dataclass(frozen=True)
class TargetWindow(Window):
    """What a decoder reads while it writes a target: its beginning, and the target's tokens but the last.

    Attributes:
        source: what the target is written of.
        first: the first position whose follower the model chose; those before it are given to it.
        last_token: the target's last token, which follows the last position.
    """

    source: Source
    first: int
    last_token: int

    @property
    def positions(self) -> int:
        """How many positions it has: where the model chooses."""
        return len(self.token_ids) - self.first

    @property
    def length(self) -> int:
        """How much of a pass it takes, in positions."""
        return len(self.token_ids) + self.source.length

    @property
    def followers(self) -> tuple[int, ...]:
        """The token that follows each position."""
        return (*self.token_ids[self.first + 1 :], self.last_token)


def inputs_of(windows: Sequence[Window], model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
    """What a model is called with to read windows in one pass, padded on the right.

    Args:
        windows: of one kind.
        model: what is called, dense or converted.

    Returns:
        The arguments, token ids [B, T] int64 among them, and which positions are real, [B, T] bool.
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
    """What a model is called with to read several sources of one kind side by side, in its number type."""
    inputs = sources[0].together(sources)
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }


def write_targets(
    model: PreTrainedModel,
    examples: Sequence[Example],
    window_length: int,
    positions: int | None = None,
    run: Callable[..., Iterator[Any]] | None = None,
) -> list[TargetWindow | None]:
    """Make windows of examples, and have the model write, greedily, the targets that are not given.

    Args:
        model: the dense model, or a converted one.
        examples: sources with targets or without.
        window_length: tokens of a target, at most.
        positions: how many are wanted; None takes all examples.
        run: deals batches out to processes, as [`Processes.run`] does.

    Returns:
        A window for each example, in their order, until there are enough; None where nothing is written.
    """
    batches = list(_batches(examples))
    calls = ((batch, window_length) for batch in batches)
    results = (windows_of_batch(model, *call) for call in calls) if run is None else run(windows_of_batch, model, calls)
    windows: list[TargetWindow | None] = []
    left = positions
    with progress("Writing the targets", len(examples), "sources") as advance:
        for batch, made in zip(batches, results, strict=True):
            windows += made
            advance(len(batch))
            if left is not None and (left := left - sum(one.positions for one in made if one)) <= 0:
                break
    return windows


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Examples of one kind side by side: with targets, or without."""
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
    """Windows of examples that all have targets, or none.

    Args:
        model: the dense model, or a converted one.
        examples: sources side by side.
        window_length: tokens of a target, at most.
    """
    if examples[0].target_ids is None:
        rows = write(model, examples, window_length)
    elif examples[0].follows_prompt:
        prompts = write(model, examples, 1)
        rows = [
            ((*tokens[: first + 1], *(one.target_ids or ())[:window_length]), first)
            for (tokens, first), one in zip(prompts, examples, strict=True)
        ]
    else:
        rows = [((*_beginning(model, one.target_ids or ()), *(one.target_ids or ())[-1:]), 0) for one in examples]
    return [
        TargetWindow(one.document, tokens[:-1], one.source, first, tokens[-1]) if len(tokens) > first + 1 else None
        for (tokens, first), one in zip(rows, examples, strict=True)
    ]


def _beginning(model: Any, target_ids: tuple[int, ...]) -> tuple[int, ...]:
    """What the decoder reads to write a target: its start, and all but the last token."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return tuple(model.prepare_decoder_input_ids_from_labels(torch.tensor([target_ids]))[0].tolist())
    return (model.generation_config.decoder_start_token_id, *target_ids[:-1])


def write(
    model: Any, examples: Sequence[Example], new_tokens: int, **choices: Any
) -> list[tuple[tuple[int, ...], int]]:
    """What a model writes of sources side by side, greedily.

    Args:
        model: dense or converted.
        examples: sources, whose targets are not looked at.
        new_tokens: to write at most.
        **choices: further ones of `generate`.

    Returns:
        For each source the decoder's token ids, prompt and all, up to the end, and the last position of the prompt.
    """
    inputs = read([one.source for one in examples], model)
    prompt = _SeesPrompt()
    choices = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens, **choices}
    if "force_unique_generate_call" in inspect.signature(_own_generate(model)).parameters:
        choices["force_unique_generate_call"] = True  # else Whisper cuts its prompt off
    written = model.generate(**inputs, **choices, logits_processor=LogitsProcessorList([prompt]))
    ends = model.generation_config.eos_token_id
    ends = {*ends} if isinstance(ends, list) else {ends}
    rows = []
    for row in written.tolist():
        end = next((place for place in range(prompt.length, len(row)) if row[place] in ends), len(row) - 1)
        rows.append((tuple(row[: end + 1]), prompt.length - 1))
    return rows


def _own_generate(model: Any) -> Callable[..., Any]:
    """The `generate` that a model runs in the end: a converted one runs that of the dense model's class."""
    return type(getattr(model, "base", model)).generate


class _SeesPrompt(LogitsProcessor):
    """Changes nothing, and keeps how many tokens the decoder began with."""

    length = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.length = self.length or input_ids.shape[1]
        return scores
