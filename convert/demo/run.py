"""The demo: converts, evaluates and reloads the bundled model, and measures speed on a larger one."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hf_topk.bench.competitors import Competitors
from hf_topk.bench.decode_speed import Decoding
from hf_topk.bench.random_experts import convert_at_random
from hf_topk.bench.shapes import random_model
from hf_topk.bench.timing import Spread
from hf_topk.compute_dtype import DECODING, faster_dtype
from hf_topk.documents import read_documents
from hf_topk.evaluation.fidelity import Fidelity, measure_fidelity
from hf_topk.loading import load_converted
from hf_topk.model.errors import TopKExpertsError
from hf_topk.windows import WINDOW_LENGTH, make_windows

from ..recipe import Recipe
from ..run import convert_checkpoint

TEXT = Path(__file__).parent / "kwaidan.txt"
PROMPT = "The old man looked at the sea and said"
NEW_TOKENS = 48
SHAPE, ROUNDS = "gemma-3-270m", 2  # of the speed measurement
GENERATE_BOTH = """
import json, sys
import hf_topk
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, prompt, new_tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory)
tokenizer = AutoTokenizer.from_pretrained(directory)
inputs = tokenizer(prompt, return_tensors="pt")
texts = {}
for model.head_mode in ("dense", "sparse"):
    tokens = model.generate(**inputs, max_new_tokens=int(new_tokens), do_sample=False, pad_token_id=0)
    texts[model.head_mode] = tokenizer.decode(tokens[0], skip_special_tokens=True)
print(json.dumps(texts))
"""


def run_demo() -> None:
    """Run the demo in a temporary folder, and print two tables and two texts to standard output.

    The bundled model's head is too small for a speed-up, so speed is measured on the shape of a published model.

    Raises:
        TopKExpertsError: when the new process fails.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        out = str(Path(temporary) / "books-topk")
        convert_checkpoint(None, out, Recipe())
        model, tokenizer = load_converted(out)
        windows = make_windows(read_documents(str(TEXT)), tokenizer, WINDOW_LENGTH, None, seed=0)
        fidelity = measure_fidelity(model, windows)
        texts = _generate_in_a_new_process(out)
    _show_bundled(fidelity, texts)
    _show_speed(_tokens_a_second())
    Console().print(f"\nThe whole demo took {time.monotonic() - started:.0f} s.", highlight=False)


def _generate_in_a_new_process(directory: str) -> dict[str, str]:
    command = [sys.executable, "-c", GENERATE_BOTH, directory, PROMPT, str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TopKExpertsError(f"the converted model did not load in a new process: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


@torch.inference_mode()
def _tokens_a_second() -> dict[str, Spread]:
    """Speed of greedy decoding with random weights, by head."""
    dtype = faster_dtype(torch.bfloat16, torch.device("cpu"), DECODING)
    models = Competitors.of(convert_at_random(random_model(SHAPE, dtype)))
    return Decoding(models, ROUNDS).greedy()


def _show_bundled(fidelity: Fidelity, texts: dict[str, str]) -> None:
    table = _table(f"The bundled model on {fidelity.positions:,} positions of an unseen book", "dense", "sparse")
    table.add_row("top-1 agreement", "100 %", f"{100 * fidelity.agreement:.2f} %")
    table.add_row("perplexity", f"{fidelity.perplexity_dense:.2f}", f"{fidelity.perplexity_sparse:.2f}")
    table.add_row("bytes of the head read", "100 %", f"{100 * fidelity.bytes_read:.1f} %")
    console = Console()
    console.print(table)
    for head in ("dense", "sparse"):
        console.print(f"\n{head} head: {texts[head]}", highlight=False, markup=False)


def _show_speed(speed: dict[str, Spread]) -> None:
    heads = ("dense", "sparse", "lossless")
    table = _table(f"Speed of {SHAPE}, with random weights and {torch.get_num_threads()} threads", *heads)
    medians = [speed[head].median for head in heads]
    table.add_row("tokens/s", *(f"{median:.1f}" for median in medians))
    table.add_row("ms/token", *(f"{1000 / median:.1f}" for median in medians))
    console = Console()
    console.print()
    console.print(table)
    console.print(
        f"Without a head the speed would be {speed['no_head'].median:.1f} tokens/s. Where the sparse head is not "
        "faster, as in the bundled model, head mode auto runs the dense one.",
        highlight=False,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    return table
