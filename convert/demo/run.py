"""The main job on the bundled model: convert, evaluate, load in a new process, generate, compare."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hf_topk.documents import read_documents
from hf_topk.errors import TopKExpertsError
from hf_topk.loading import load_converted
from hf_topk.measure.fidelity import WINDOW_LENGTH, Fidelity, measure_fidelity
from hf_topk.measure.timing import head_milliseconds
from hf_topk.text import make_windows

from ..recipe import Recipe
from ..run import convert_checkpoint

TEXT = Path(__file__).parent / "kwaidan.txt"
PROMPT = "The old man looked at the sea and said"
NEW_TOKENS = 48
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
    """Run the main job in a temporary folder and print one table and the two texts on standard output.

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
        milliseconds = head_milliseconds(model.head)
        texts = _generate_in_a_new_process(out)
    _show(fidelity, milliseconds, texts, time.monotonic() - started)


def _generate_in_a_new_process(directory: str) -> dict[str, str]:
    command = [sys.executable, "-c", GENERATE_BOTH, directory, PROMPT, str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TopKExpertsError(f"the converted model did not load in a new process: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def _show(fidelity: Fidelity, milliseconds: dict[str, float], texts: dict[str, str], seconds: float) -> None:
    table = Table(title=f"The bundled model on {fidelity.positions:,} positions of a book it has not seen")
    for column in ("", "dense head", "sparse head"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("agreement", "100 %", f"{100 * fidelity.agreement:.2f} %")
    table.add_row("perplexity", f"{fidelity.perplexity_dense:.2f}", f"{fidelity.perplexity_sparse:.2f}")
    table.add_row("bytes read", "100 %", f"{100 * fidelity.bytes_read:.1f} %")
    table.add_row("head time, 1 position", *(f"{milliseconds[head]:.2f} ms" for head in ("dense", "sparse")))
    console = Console()
    console.print(table)
    for head in ("dense", "sparse"):
        console.print(f"\n{head} head: {texts[head]}", highlight=False, markup=False)
    console.print(f"\nThe whole demo took {seconds:.0f} s.", highlight=False)
