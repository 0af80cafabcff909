"""Sample text that the dense model writes itself, for when there is none to distil on."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_topk.progress import progress
from hf_topk.text import Window

from .processes import ALONE, Processes

DOCUMENTS_AT_ONCE = 64


def sample_from_model(
    dense: PreTrainedModel,
    positions: int,
    window_length: int,
    seed: int,
    folder: Path,
    processes: Processes = ALONE,
) -> list[Window]:
    """Let the dense model write documents from its own distribution, untruncated and at temperature 1.

    Batches of documents go to a file as they are made, each with a seed of its own, so that an interrupted call picks
    up where it stopped and ends with the same documents.

    Args:
        dense: the dense model.
        positions: tokens in all documents together.
        window_length: tokens that a document has at most.
        seed: of the sampling.
        folder: where the file is kept.
        processes: what the batches are dealt out to: their seeds make them the same wherever they are written.

    Returns:
        One window a document, the last ones cut so that there are `positions` tokens.
    """
    file = folder / "sample.jsonl"
    documents = _whole_batches(file)
    with progress("Sampling text from the model", positions, "tokens") as advance, file.open("a") as out:
        advance(sum(map(len, documents)))
        for batch in _missing_batches(dense, documents, positions, window_length, seed, processes):
            out.write(json.dumps(batch) + "\n")
            out.flush()
            documents += batch
            advance(sum(map(len, batch)))
    return _cut(documents, positions)


def _missing_batches(
    dense: PreTrainedModel,
    documents: list[list[int]],
    positions: int,
    window_length: int,
    seed: int,
    processes: Processes,
) -> Iterator[list[list[int]]]:
    have = sum(map(len, documents))
    seeds = itertools.count(seed + len(documents) // DOCUMENTS_AT_ONCE)
    batches = processes.run(_write_documents, dense, ((window_length, one) for one in seeds))
    while have < positions:
        batch = next(batches)
        have += sum(map(len, batch))
        yield batch


def _write_documents(dense: PreTrainedModel, window_length: int, seed: int) -> list[list[int]]:
    end = dense.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [] if end is None else [end])
    devices = [dense.device] if dense.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        start = _start_tokens(dense)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=window_length - 1,
            min_new_tokens=1,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
        )
        # `generate` fills what is not set from the model's own configuration: a penalty there would change the text.
        own, dense.generation_config = dense.generation_config, config
        try:
            written = cast(Any, dense).generate(
                start,
                attention_mask=torch.ones_like(start),
                generation_config=config,
                logits_processor=LogitsProcessorList([DrawByInversion()]),
            )
        finally:
            dense.generation_config = own
    return [_until_end(row, ends) for row in written.tolist()]


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


def _start_tokens(dense: PreTrainedModel) -> Tensor:
    """The token that a document starts with, or random ones where the model has none: [B, 1]."""
    config = dense.generation_config
    start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    start = start[0] if isinstance(start, list) else start
    shape = (DOCUMENTS_AT_ONCE, 1)
    if start is None:
        # Either can have rows that the other has not.
        ends = (dense.get_input_embeddings(), dense.get_output_embeddings())
        vocab_size = min(cast(Tensor, end.weight).shape[0] for end in ends)
        return torch.randint(vocab_size, shape, device=dense.device)
    return torch.full(shape, start, device=dense.device)


def _until_end(token_ids: list[int], ends: set[int]) -> list[int]:
    for place, token in enumerate(token_ids[1:], start=1):
        if token in ends:
            return token_ids[:place]
    return token_ids


def _whole_batches(file: Path) -> list[list[int]]:
    """The documents of an earlier call; a line that was cut short is taken out of the file."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        file.write_text("".join(whole), encoding="utf-8")
    return [document for line in whole for document in json.loads(line)]


def _cut(documents: list[list[int]], positions: int) -> list[Window]:
    windows: list[Window] = []
    for number, document in enumerate(documents):
        token_ids = tuple(document[:positions])
        if len(token_ids) > 1:
            windows.append(Window(number, token_ids))
        positions -= len(token_ids)
    return windows
