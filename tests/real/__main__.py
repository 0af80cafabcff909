"""`make real`: builds real checkpoints, converts them with the defaults, and prints a table of metrics for each."""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_topk.cli import main
from hf_topk.console import quiet
from hf_topk.loading import load_converted
from hf_topk.model.errors import InputError, TopKExpertsError

from .chat import chat_agreement, read_prompts
from .checkpoints import PACKAGES, checkpoint
from .speech import measure_speech
from .table import markdown_table
from .whisper import checkpoint as whisper_checkpoint

HELD_OUT = Path(__file__).with_name("held_out")
WHISPER = "whisper"
KINDS = ("code", "french", "german")
DTYPE = "float32"  # fast on any CPU, and rounding hides no difference of the heads
POSITIONS = 6000
LOSSLESS_PROMPTS = 8  # of 64 new tokens each
BENCH = ("--batches", "1", "--rounds", "4", "--without", "int8", "--without", "hnsw", "--without", "flashhead")

Metrics = dict[str, dict[str, Any]]


def run() -> None:
    """Build, convert and measure what the command line asks for.

    Raises:
        InputError: there is no such model or text.
        TopKExpertsError: a package cannot be downloaded, or a command of hf-topk failed.
    """
    parser = argparse.ArgumentParser(prog="make real", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"one of {', '.join((*PACKAGES, WHISPER))}")
    parser.add_argument("--text", required=True, help="file or folder to measure on; not used for conversion")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the models")
    parser.add_argument("--convert", default="", help="options passed on to hf-topk convert")
    given = parser.parse_args()
    quiet()
    for name in given.models:
        if name not in (*PACKAGES, WHISPER):
            raise InputError(f"unknown model '{name}': choose from {', '.join((*PACKAGES, WHISPER))}")
    if not Path(given.text).exists():
        raise InputError(f"there is no file or folder {given.text} to measure on")
    for name in given.models:
        folder = given.cache / name
        if name == WHISPER:
            dense = whisper_checkpoint(folder / "dense")
            metrics = measure_speech(dense, folder, Path(given.text), _run, shlex.split(given.convert))
        else:
            dense = checkpoint(name, folder / "dense")
            metrics = measure(dense, folder / "converted", given.text, shlex.split(given.convert))
        (folder / "figures.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
        print(markdown_table(name, metrics), end="\n\n", flush=True)


def measure(dense: Path, converted: Path, text: str, convert_options: list[str]) -> Metrics:
    """Convert a dense model and measure it.

    Args:
        dense: a dense model's folder.
        converted: the folder to convert to; an existing one is replaced.
        text: file or folder of prose to measure on.
        convert_options: of `hf-topk convert`.

    Returns:
        The JSON that the commands print, by subject: conversion, prose, code, french, german, speed; and chat for a
        model with a chat template.
    """
    conversion = _run("convert", dense, converted, "--overwrite", *convert_options)
    lossless = ("--lossless", "--prompts", LOSSLESS_PROMPTS)
    metrics = {"conversion": conversion, "prose": _evaluate(converted, text, "--positions", POSITIONS, *lossless)}
    metrics |= {kind: _evaluate(converted, HELD_OUT / f"{kind}.txt") for kind in KINDS}
    metrics["speed"] = _run("bench", converted, "--dtype", DTYPE, *BENCH)
    return metrics | _chat(converted)


def _evaluate(converted: Path, text: str | Path, *options: object) -> dict[str, Any]:
    metrics = _run("evaluate", converted, "--text", text, "--dtype", DTYPE, *options)
    dense, sparse = metrics["perplexity_dense"], metrics["perplexity_sparse"]  # null if infinite
    return metrics | {"perplexity_over_dense": sparse / dense - 1 if sparse and dense else None}


def _chat(converted: Path) -> Metrics:
    """Agreement on the model's own answers; empty for a model without a chat template."""
    model, tokenizer = load_converted(str(converted), dtype=DTYPE)
    if tokenizer.chat_template is None:
        return {}
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for prompt in read_prompts()
    ]
    return {"chat": dataclasses.asdict(chat_agreement(model, prompts))}


def _run(command: str, *arguments: object) -> dict[str, Any]:
    """Run a command of hf-topk as a user would; progress goes to our stderr."""
    words = [str(Path(sys.executable).with_name("hf-topk")), command, *map(str, arguments), "--json"]
    print("$ hf-topk", shlex.join(words[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise TopKExpertsError(f"hf-topk {command} failed, see above (exit code {done.returncode})")
    return json.loads(done.stdout)


if __name__ == "__main__":
    main(run)
