"""What the examples share: a converted model, and the same prompts continued with each head."""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert_checkpoint

HEADS = ("dense", "sparse", "lossless")
BUNDLED = Path(tempfile.gettempdir(), "hf-topk-examples", "books-topk")


@dataclass
class Output:
    """What one head wrote.

    Attributes:
        answers: the new tokens of each prompt.
        seconds: for all of them, prefill included.
        dense_passes: of the dense head.
    """

    answers: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    dense_passes: int = 0

    @property
    def tokens(self) -> int:
        """New tokens of all answers."""
        return sum(map(len, self.answers))

    def same_tokens(self, other: "Output") -> int:
        """Tokens up to the first difference, over all answers."""
        return sum(same_length(one, two) for one, two in zip(self.answers, other.answers, strict=True))

    def same_answers(self, other: "Output") -> int:
        """Answers that are the same token for token."""
        return sum(one == two for one, two in zip(self.answers, other.answers, strict=True))


def same_length(one: list[int], two: list[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return next(
        (place for place, (first, second) in enumerate(zip(one, two, strict=False)) if first != second),
        min(len(one), len(two)),
    )


def load(folder: str | Path | None) -> tuple[TopKExpertsForCausalLM, PreTrainedTokenizerBase]:
    """Load a converted model and its tokenizer; None: the bundled model, which the first call converts in a minute."""
    if folder is None:
        folder = BUNDLED
        if not folder.exists():
            convert_checkpoint(None, folder, Recipe())
    # float32 is what most CPUs compute fastest in; a GPU takes the dtype that is stored if `dtype` is left out.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.pad_token_id = model.generation_config.pad_token_id or 0
    return model, AutoTokenizer.from_pretrained(folder)


def choose_head(model: TopKExpertsForCausalLM, head: str) -> dict[str, bool]:
    """Set the head mode of a head's name, and return what `generate` takes besides."""
    model.head_mode = "dense" if head == "dense" else "sparse"
    return {"lossless": head == "lossless"}


def write_with_each_head(
    model: TopKExpertsForCausalLM, inputs: Iterable[Any], seed: int = 0, **choices: Any
) -> dict[str, Output]:
    """Continue each of some tokenised prompts with each head in turn.

    Args:
        model: a converted model.
        inputs: what the tokenizer made of each prompt, as tensors.
        seed: for sampling, set anew for each prompt and head.
        **choices: further arguments of `generate`.
    """
    outputs = {head: Output() for head in HEADS}
    for number, given in enumerate(inputs):
        if number == 0:  # the first call of each head prepares it, and is not timed
            for head in HEADS:
                model.generate(**given, **{**choices, "max_new_tokens": 4}, **choose_head(model, head))
        for head, output in outputs.items():
            torch.manual_seed(seed)
            arguments = choose_head(model, head)
            began = time.perf_counter()
            tokens = model.generate(**given, **choices, **arguments)[0, given["input_ids"].shape[1] :].tolist()
            output.seconds += time.perf_counter() - began
            output.answers.append(tokens)
            stats = model.last_generation_stats
            output.dense_passes += stats.dense_passes if stats else len(tokens) * (head == "dense")
    return outputs


def print_texts(prompts: Iterable[str], texts: dict[str, list[str]]) -> None:
    """Print what each head wrote for each prompt.

    Args:
        prompts: titles.
        texts: one of each prompt, by head.
    """
    for number, prompt in enumerate(prompts):
        print(f"\n{prompt}")
        for head, written in texts.items():
            print(f"  {head}: {' '.join(written[number].split())}")


def print_comparison(outputs: dict[str, Output], **columns: dict[str, str]) -> None:
    """Print a row for each head: speed, and what is the same as with the dense head.

    Args:
        outputs: by head.
        **columns: further columns, whose values are by head.
    """
    names = ["tokens/s", "answers identical", "tokens identical", "dense passes/token", *columns]
    print(f"\n{'head':10}" + "".join(f"{name.replace('_', ' '):>20}" for name in names))
    dense = outputs["dense"]
    for head, output in outputs.items():
        cells = [
            f"{output.tokens / output.seconds:.1f}",
            f"{output.same_answers(dense)} of {len(dense.answers)}",
            f"{output.same_tokens(dense):,} of {dense.tokens:,}",
            f"{output.dense_passes / output.tokens:.3f}",
            *(column[head] for column in columns.values()),
        ]
        print(f"{head:10}" + "".join(f"{cell:>20}" for cell in cells))
