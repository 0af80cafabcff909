"""The sample that conversion takes by default: bundled texts of many kinds and, of a chat model, its own answers."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_topk.documents import Document, read_documents
from hf_topk.errors import InputError
from hf_topk.progress import progress
from hf_topk.text import Window, as_text, make_windows

from .processes import ALONE, Processes
from .recipe import Recipe

TEXTS = Path(__file__).parent / "sample" / "texts"
PROMPTS = Path(__file__).parent / "sample" / "prompts.jsonl"
ANSWERS_AT_ONCE = 32
NEW_TOKENS = 160  # of an answer, at most

Batch = tuple[list[list[int]], int, int | None]  # prompts, the tokens that an answer has at most, a seed to draw with


def bundled_documents() -> list[Document]:
    """The texts, and behind them the prompts."""
    return [*read_documents(str(TEXTS)), *read_documents(str(PROMPTS))]


def no_tokenizer() -> InputError:
    """The error for a model that cannot read any text."""
    return InputError("sample text needs a tokenizer, and the model has none: put the tokenizer's files in its folder")


def mixed_sample(
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    folder: Path,
    processes: Processes = ALONE,
) -> list[Window]:
    """Take the bundled texts or, where the tokenizer has a chat template, half of them and half the model's answers.

    Args:
        dense: the dense model.
        tokenizer: its tokenizer.
        recipe: how many positions, the length of windows, and a seed; the texts may give fewer.
        folder: where answers are kept as they are written, and found again.
        processes: what the answers are dealt out to.

    Raises:
        InputError: when there is no tokenizer, or its chat template takes no questions.
    """
    if tokenizer is None:
        raise no_tokenizer()
    texts, positions, length = read_documents(str(TEXTS)), recipe.positions, recipe.window_length
    answers = []
    if tokenizer.chat_template and positions > 1:
        answers = own_answers(
            dense, _prompts(tokenizer, recipe), positions // 2, length, recipe.seed, folder, processes
        )
    positions -= sum(map(len, answers))
    windows = make_windows(texts, tokenizer, length, positions, recipe.seed)
    return windows + [Window(len(texts) + number, tuple(ids)) for number, ids in enumerate(answers)]


def _prompts(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[list[int]]:
    """The bundled prompts in random order, as token ids that the model's answer follows."""
    prompts = [as_text(chat, tokenizer, to_answer=True) for chat in read_documents(str(PROMPTS))]
    random.Random(recipe.seed).shuffle(prompts)
    ids: list[list[int]] = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    return [some[: recipe.window_length - 1] for some in ids]


def own_answers(
    dense: PreTrainedModel,
    prompts: list[list[int]],
    positions: int,
    window_length: int,
    seed: int,
    folder: Path,
    processes: Processes = ALONE,
) -> list[list[int]]:
    """Let the dense model answer, every other batch with its likeliest tokens and every other one at temperature 1.

    Batches go to a file as they are made, each with a seed of its own, so that an interrupted call picks up where it
    stopped and ends with the same answers.

    Args:
        dense: the dense model.
        prompts: token ids of each, fewer than `window_length`.
        positions: tokens of all prompts and answers together, at most.
        window_length: tokens that a prompt and its answer have at most.
        seed: of the sampling.
        folder: where the file is kept.
        processes: what the batches are dealt out to: their seeds make them the same wherever they are written.

    Returns:
        Token ids of prompts and answers, the last ones cut so that there are no more than `positions`.
    """
    file = folder / "sample.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    batches = _whole_batches(file)
    left = itertools.islice(_batches(prompts, window_length, seed), len(batches), None)
    written = processes.run(_write_answers, dense, left)
    with progress("Letting the model answer", positions, "positions") as advance, file.open("a") as out:
        have = _size(batches)
        advance(have)
        while have < positions and (batch := next(written, None)):
            out.write(json.dumps(batch) + "\n")
            out.flush()
            batches.append(batch)
            have += _size([batch])
            advance(_size([batch]))
    return _cut([answer for batch in batches for answer in batch], positions)


def _batches(prompts: list[list[int]], window_length: int, seed: int) -> Iterator[Batch]:
    for number, start in enumerate(range(0, len(prompts), ANSWERS_AT_ONCE)):
        some = prompts[start : start + ANSWERS_AT_ONCE]
        room = min(NEW_TOKENS, window_length - max(map(len, some)))
        yield some, room, None
        yield some, room, (seed + number) % 2**63


def _size(batches: list[list[list[int]]]) -> int:
    return sum(len(answer) for batch in batches for answer in batch)


def _write_answers(
    dense: PreTrainedModel, prompts: list[list[int]], new_tokens: int, seed: int | None
) -> list[list[int]]:
    """Prompts and what follows them, without the token that ends it."""
    end = dense.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [] if end is None else [end])
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    token_ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )
    drawing = [] if seed is None else [DrawByInversion()]
    devices = [dense.device] if dense.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed or 0)
        # `generate` fills what is not set from the model's own configuration: a penalty there would change the text.
        own, dense.generation_config = dense.generation_config, config
        try:
            written = cast(Any, dense).generate(
                token_ids.to(dense.device),
                attention_mask=(torch.arange(longest) >= padding.unsqueeze(-1)).long().to(dense.device),
                generation_config=config,
                logits_processor=LogitsProcessorList(drawing),
            )
        finally:
            dense.generation_config = own
    return [
        prompt + list(itertools.takewhile(lambda token: token not in ends, row[longest:]))
        for prompt, row in zip(prompts, written.tolist(), strict=True)
    ]


class DrawByInversion(LogitsProcessor):
    """Draws a token from the distribution and leaves no other.

    One random number a row, where `do_sample` draws one a token, which takes longer than a small model's step.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draw for each row: scores [B, V] to zero for what was drawn and minus infinity elsewhere."""
        cumulated = scores.float().softmax(dim=-1).cumsum(dim=-1)
        # Above zero and up to the last sum, whatever it rounds to: what has no chance is not drawn.
        threshold = (1.0 - torch.rand(len(scores), 1, device=scores.device)) * cumulated[:, -1:]
        drawn = torch.searchsorted(cumulated, threshold).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _whole_batches(file: Path) -> list[list[list[int]]]:
    """The batches of an earlier call; a line that was cut short is taken out of the file."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole]


def _cut(answers: list[list[int]], positions: int) -> list[list[int]]:
    """As many as make `positions` tokens, the last one cut; a single token says nothing about the next."""
    kept = []
    for answer in answers:
        if len(some := answer[:positions]) > 1:
            kept.append(some)
        positions -= len(some)
    return kept
