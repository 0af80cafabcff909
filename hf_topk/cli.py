"""The command line: `hf-topk`. Commands import their code when they run, except for the recipe, for its options."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import print_json, print_table, quiet
from .convert.options import takes_choices
from .convert.recipe import Recipe, read_yaml
from .model.errors import INTERRUPTED, InputError, TopKExpertsError

app = typer.Typer(
    name="hf-topk",
    help="Make the output head of a language model cheap: its vocabulary is partitioned into experts, of which a small "
    "router picks a few per position.",
    epilog="Results go to standard output, progress to standard error. Exit codes: 0 done, 1 failed, 2 input refused, "
    "130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Revision = Annotated[str | None, typer.Option(help="Branch of the repository. [default: main]")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")]
Device = Annotated[str, typer.Option(help="cpu, cuda:0, ..., or auto: the accelerator, if any.")]
Mode = Annotated[str, typer.Option("--head-mode", help="auto, sparse or dense.")]
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless", help="Generate the dense model's tokens: draft with the sparse head, verify with the dense one."
    ),
]
Directory = Annotated[str, typer.Argument(metavar="DIR", help="A converted model: a folder, or a Hub repository.")]


@app.command()
@takes_choices
def convert(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] OUT",
            help="The dense model (a folder or a Hub repository; by default the bundled demo model) and the folder to "
            "write.",
        ),
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file of choices; command-line options override it.")
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Device of the dense model, such as cuda, or 'auto' to spread a model that is too large for one "
            "device over all devices, RAM and disk. [default: RAM]"
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload the result to this Hub repository; access is checked first."),
    ] = None,
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted conversion.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier converted model.")] = False,
    html_report: Annotated[
        bool, typer.Option("--html-report", help="Write OUT/report.html, the report that `inspect --html` makes.")
    ] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Convert a dense language model; the result loads with AutoModelForCausalLM.

    It is stored in the dense model's dtype. The conversion computes in float32 if that is faster on this machine.
    """
    from .convert.processes import is_worker, run_worker

    quiet()
    if is_worker():
        run_worker()
        return
    if len(paths) > 2:
        listed = ", ".join(paths)
        raise InputError(f"expected [MODEL] OUT, got {len(paths)} arguments ({listed}): quote paths that have spaces")
    choices = read_yaml(recipe) if recipe else {}
    choices |= {name: value for name, value in given.items() if value is not None}
    chosen = Recipe.from_dict(choices)
    if not push_to_hub and (private or revision or create_pr):
        raise InputError("--private, --revision and --create-pr need --push-to-hub REPO")
    from .convert import Destination, convert_checkpoint

    out = paths[-1]
    report = convert_checkpoint(
        paths[0] if len(paths) == 2 else None,
        out,
        chosen,
        overwrite=overwrite,
        resume=resume,
        device_map=device_map,
        destination=Destination(push_to_hub, private, revision, create_pr) if push_to_hub else None,
        html_report=html_report,
    )
    on_the_hub, metrics = {"url": report.uploaded.url} if report.uploaded else {}, report.metrics()
    if as_json:
        print_json({"out": out, **on_the_hub, **metrics, "recipe": report.recipe.to_dict()})
        return
    print_table(
        f"Wrote {out}",
        {
            **report.summary(),
            **({"report": str(Path(out) / "report.html")} if html_report else {}),
            **on_the_hub,
        },
    )


@app.command()
def evaluate(
    directory: Directory,
    text: Annotated[
        str,
        typer.Option(
            help="Text to measure on: a file, a folder, or a data set; for a model with an encoder pairs of source and "
            "target, source text, or a folder of recordings."
        ),
    ],
    num_experts_per_tok: Annotated[
        int | None,
        typer.Option("--num-experts-per-tok", "-k", help="Experts picked per position. [default: the model's own]"),
    ] = None,
    positions: Annotated[
        int | None, typer.Option(help="Measure on a random sample of this many tokens. [default: all of the text]")
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Also compare lossless and dense greedy decoding, token by token.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="With --lossless: number of prompts.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="With --lossless: prompts per batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: as stored, or float32 if faster.")] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compare the sparse head with the dense one on your own text."""
    from .compute_dtype import READING
    from .documents import read_documents
    from .evaluation.fidelity import measure_fidelity
    from .loading import load_converted
    from .windows import make_windows, readable_length

    quiet()
    model, tokenizer = load_converted(directory, num_experts_per_tok, dtype, device, fastest_for=READING)
    if model.config.is_encoder_decoder:
        from .evaluation.outputs import measure_outputs

        outputs = measure_outputs(model, tokenizer, text, positions)
        fidelity, metrics, rows = outputs.fidelity, outputs.metrics(), outputs.rows()
    else:
        documents = read_documents(text)
        windows = make_windows(documents, tokenizer, readable_length(model.config), positions, seed=0)
        fidelity = measure_fidelity(model, windows)
        metrics, rows = dataclasses.asdict(fidelity), {}
    if lossless and not model.config.is_encoder_decoder:
        from .evaluation.lossless_comparison import PROMPT_LENGTH, compare_lossless, prompts_of

        beginnings = prompts_of(make_windows(documents, tokenizer, PROMPT_LENGTH, positions, seed=0), prompts)
        compared = compare_lossless(model, beginnings, batch_size=batch_size)
        metrics, rows = metrics | compared.metrics(), compared.rows()
    if as_json:
        print_json(metrics)
        return
    print_table(
        f"{directory} on {fidelity.positions:,} positions of {text}",
        {
            "top-1 agreement": f"{fidelity.agreement:.2%} (sparse argmax = dense argmax)",
            "top-5 recall": f"{fidelity.top5_containment:.2%} (dense argmax in the sparse top 5)",
            "KL divergence": f"{fidelity.kl:.4f} nats",
            "perplexity": f"{fidelity.perplexity_dense:.2f} dense, {fidelity.perplexity_sparse:.2f} sparse",
            "ECE": f"{fidelity.calibration_error_dense:.4f} dense, {fidelity.calibration_error_sparse:.4f} sparse; "
            f"mean error of log Z {fidelity.log_z_error:+.4f}",
            "tail": f"rank correlation {fidelity.tail_rank_correlation:.3f} with the dense logits of unscored tokens",
            "bytes read": f"{fidelity.bytes_read:.1%} of the dense head",
            **rows,
        },
    )


@app.command()
def inspect(
    directory: Directory,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML page instead of tables.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Measure on this text, as `evaluate` does. [default: what the conversion measured, on held-out "
            "documents of the calibration text]"
        ),
    ] = None,
    positions: Annotated[
        int | None, typer.Option(help="With --text: a random sample of this many tokens. [default: all of the text]")
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Show the speed that `hf-topk bench DIR --json > FILE` measured."),
    ] = None,
    experts: Annotated[int, typer.Option(min=1, help="Experts to list in the table, the most used first.")] = 20,
) -> None:
    """Report on a converted model: agreement against bytes read, router, use of the experts, misses, recipe."""
    from .inspection.facts import measure_on, read_facts
    from .inspection.page import check_page, write_page
    from .inspection.tables import print_tables

    quiet()
    if html is not None:
        check_page(html)
    if positions is not None and text is None:
        raise InputError("--positions needs --text FILE")
    facts = read_facts(directory, bench, runs=text is not None)
    if text is not None:
        facts = measure_on(facts, text, positions)
    if html is not None:
        write_page(facts, html)
        print(f"Wrote {html}")
        return
    print_tables(facts, experts)


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[
        str, typer.Argument(help="The text to continue or to translate; for a speech model a .wav or .flac file.")
    ],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens to generate. [default: 64, or 256 with an encoder]")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    head_mode: Mode = "auto",
    lossless: Lossless = False,
    device: Device = "auto",
) -> None:
    """Generate text with a converted model, streamed: continue, translate or transcribe the prompt."""
    import torch
    from transformers import TextStreamer

    from .compute_dtype import DECODING
    from .loading import load_converted
    from .targets import prompt_inputs

    quiet()
    model, tokenizer = load_converted(directory, device=device, fastest_for=DECODING)
    model.head_mode = head_mode  # type: ignore[assignment]  # the setter checks it
    inputs = prompt_inputs(prompt, model, tokenizer)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    for one in inputs:
        model.generate(
            **one,
            **sampling,
            num_beams=1,  # a streamer takes no beams
            max_new_tokens=max_new_tokens or (256 if model.config.is_encoder_decoder else 64),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, model.config.is_encoder_decoder, skip_special_tokens=True),
            # None: as in the generation config.
            lossless=lossless or None,
        )
    if (stats := model.last_generation_stats) is not None:
        print(
            f"{stats.tokens} tokens, {stats.dense_passes_per_token:.2f} verification passes per token, "
            f"{stats.acceptance:.0%} of {stats.drafted} draft tokens accepted",
            file=sys.stderr,
        )


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted model's folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; created if missing.")],
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    as_json: Json = False,
) -> None:
    """Upload a converted model to the Hub, in one commit."""
    from .convert.hub import Destination, push

    quiet()
    uploaded = push(directory, Destination(repository, private, revision, create_pr))
    if as_json:
        print_json(dataclasses.asdict(uploaded))
    else:
        print(uploaded.url)


@app.command()
def serve(
    directory: Directory,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    head_mode: Mode = "auto",
    lossless: Lossless = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: as the model is stored.")] = "auto",
    device: Device = "auto",
) -> None:
    """Serve a converted model to OpenAI clients, with the server of `transformers serve`."""
    from .serving import serve as serve_model

    quiet()
    serve_model(directory, host, port, head_mode=head_mode, lossless=lossless, dtype=dtype, device=device)


@app.command()
def bench(
    directory: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="A converted model: a folder, or a Hub repository.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead of DIR, a published model's shape with random weights: gemma-3-270m, gemma-3-1b, "
            "llama-3.2-1b, qwen3-0.6b, qwen2.5-0.5b, smollm2-135m, whisper-base or whisper-tiny."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: as the model is stored, bfloat16 with --shape.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: torch's own choice]")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,2,4,8,16,32,64",
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds of decoding; the head is timed in five times as many.")
    ] = 8,
    without: Annotated[
        list[str] | None, typer.Option(help="A baseline to skip: int8, flashhead or hnsw; repeatable.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Also measure with torch.compile.")] = False,
    plot: Annotated[Path | None, typer.Option(help="A .png or .svg file to plot the results to.")] = None,
    device: Device = "cpu",
    body: Annotated[
        str | None, typer.Option(help="int8 or int4: quantise the linear layers of the decoder. [default: no]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the speed of the head and of decoding, against the dense model and other methods."""
    from .bench.report import batch_sizes, tables
    from .bench.run import run_bench
    from .bench.suite import Choices

    quiet()
    choices = Choices(batch_sizes(batches), tuple(without or ()), compiled, rounds)
    metrics = run_bench(
        directory, shape, choices, dtype=dtype, device=device, decoder_format=body, threads=threads, plot=plot
    )
    if as_json:
        print_json(metrics)
        return
    for title, rows in tables(metrics):
        print_table(title, rows)


@app.command()
def demo() -> None:
    """Convert the bundled model, measure it, and generate text with the dense and the sparse head."""
    from .convert.demo.run import run_demo

    quiet()
    run_demo()


def main(command: Callable[[], Any] = app) -> None:
    """Run a command line: exit code 0 for success, 1 for failure, 2 for refused input."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        command()
    except TopKExpertsError as error:
        print(f"hf-topk: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # typer turns KeyboardInterrupt into SystemExit
            raise
        print("hf-topk: interrupted; continue a conversion with --resume", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":  # `accelerate launch -m hf_topk.cli`
    main()
