"""The command line: `hf-topk`. Each command imports its code when it runs."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import print_json, print_table, quiet
from .model.errors import INTERRUPTED, InputError, TopKExpertsError

app = typer.Typer(
    name="hf-topk",
    help="Make the output head of a language model cheap to run: its vocabulary is split into experts, and a small "
    "router picks the few that each position needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")]
Revision = Annotated[str | None, typer.Option(help="Branch of the repository. [default: main]")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request in place of committing.")]
Device = Annotated[str, typer.Option(help="cpu, cuda:0 ..., or auto: the accelerator if there is one.")]
Directory = Annotated[str, typer.Argument(metavar="DIR", help="A converted model: a folder, or a Hub repository.")]


@app.command()
def convert(
    context: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] OUT",
            help="The dense model (a folder or a Hub repository; the bundled demo model if left out) and the folder "
            "to write.",
        ),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="Sample text to learn from: a .txt, .md, .jsonl, .json, .csv or .parquet file, a folder, the name "
            "of a `datasets` data set, or 'mixed': bundled texts of many kinds. [default: mixed]"
        ),
    ] = None,
    positions: Annotated[
        int | None, typer.Option(help="How many tokens of the sample to use. [default: 24000]")
    ] = None,
    expert_size: Annotated[int | None, typer.Option(help="Tokens in an expert. [default: 16]")] = None,
    num_experts_per_tok: Annotated[
        int | None,
        typer.Option(
            "--num-experts-per-tok",
            "-k",
            help="Experts picked for a position: more agree better, fewer are faster. [default: what the target takes]",
        ),
    ] = None,
    target_agreement: Annotated[
        float | None,
        typer.Option(
            help="Read the fewest bytes that agree with the dense head this often, on held-out documents of the sample "
            "(as a 95 % lower bound). [default: 0.995, or what comes nearest]"
        ),
    ] = None,
    max_bytes_read: Annotated[
        float | None,
        typer.Option(help="Reach the target with this share of the dense head's bytes, such as 0.1, or not at all."),
    ] = None,
    allow_below_target: Annotated[
        bool | None, typer.Option("--allow-below-target", help="Convert even if the target is not reached.")
    ] = None,
    num_always_on: Annotated[
        int | None,
        typer.Option(
            help="Tokens scored at every position; 0: none, not even those that end a text. [default: about 256]"
        ),
    ] = None,
    router_rank: Annotated[
        int | None, typer.Option(help="Numbers kept to score an expert: three take a byte. [default: 384]")
    ] = None,
    tail_rank: Annotated[
        int | None, typer.Option(help="Numbers kept to screen a token: three take a byte. [default: 288]")
    ] = None,
    combine: Annotated[
        str | None, typer.Option(help="How scored logits are made: exact, router or learned. [default: exact]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random choices. [default: 0]")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file of choices; options on the command line win over it.")
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Where the dense model goes: a device such as cuda, or 'auto' to spread one that is larger than a "
            "device over all, main memory and disk. [default: main memory]"
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload the result to this repository of the Hub; checked at the start."),
    ] = None,
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier converted model.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a dense language model; the result loads with AutoModelForCausalLM.

    It is stored in the dense model's number type; what runs meanwhile computes in float32 where that is faster here.
    """
    from .convert.processes import help_first_process, is_helper

    quiet()
    if is_helper():
        help_first_process()
        return
    if len(paths) > 2:
        raise InputError(f"expected [MODEL] OUT, got {len(paths)} arguments: quote paths that have spaces")
    from .convert.recipe import Recipe, read_yaml, sample_name

    choices = read_yaml(recipe) if recipe else {}
    # What the recipe calls by the same name, the options above do too.
    keys = {field.name for field in dataclasses.fields(Recipe)}
    choices |= {name: value for name, value in context.params.items() if name in keys and value is not None}
    chosen = Recipe.from_dict(choices)
    if not push_to_hub and (private or revision or create_pr):
        raise InputError("--private, --revision and --create-pr say where to push to: give --push-to-hub REPO as well")
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
    )
    on_the_hub, figures = {"url": report.uploaded.url} if report.uploaded else {}, report.figures()
    if as_json:
        print_json({"out": out, **on_the_hub, **figures, "recipe": report.recipe.to_dict()})
        return
    print_table(
        f"Wrote {out}",
        {
            "experts": f"{figures['num_experts']:,} of {report.recipe.expert_size} tokens, "
            f"{figures['num_experts_per_tok']:,} screened for a position, {figures['num_rescored']:,} exact logits and "
            f"{report.recipe.num_always_on} always on",
            "agreement": f"{figures['agreement']:.2%}, at least {figures['agreement_lower_bound']:.2%} with 95 % "
            f"confidence, on {figures['positions']:,} held-out positions of the sample "
            f"({sample_name(report.recipe.text)})"
            + (": the target is not reached" if figures["target_reached"] is False else ""),
            "perplexity": f"{figures['perplexity_dense']:.2f} dense, {figures['perplexity_sparse']:.2f} sparse",
            "bytes read": f"{figures['bytes_read']:.1%} of the dense head",
            "added on disk": f"{figures['added_bytes'] / 1e6:.1f} MB, {figures['added_bytes_share']:.1%} of the head",
            "time": f"{figures['seconds']:.0f} s",
            **on_the_hub,
        },
    )


@app.command()
def evaluate(
    directory: Directory,
    text: Annotated[str, typer.Option(help="Text to measure on: a file, a folder, or a data set.")],
    num_experts_per_tok: Annotated[
        int | None, typer.Option("--num-experts-per-tok", "-k", help="Experts scored, in place of the model's own.")
    ] = None,
    positions: Annotated[
        int | None, typer.Option(help="Measure on a sample of so many tokens. [default: all of the text]")
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Also decode greedily, and compare with the dense model token by token.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="With --lossless: how many prompts to go on from.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="With --lossless: prompts in a batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: as stored, or float32 if faster.")] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure how faithful the sparse head is to the dense one on your own text."""
    from .documents import read_documents
    from .evaluation.fidelity import measure_fidelity
    from .loading import load_converted
    from .windows import make_windows, readable_length

    quiet()
    documents = read_documents(text)
    model, tokenizer = load_converted(directory, num_experts_per_tok, dtype, device, fastest=True)
    windows = make_windows(documents, tokenizer, readable_length(model.config), positions, seed=0)
    fidelity = measure_fidelity(model, windows)
    figures, rows = dataclasses.asdict(fidelity), {}
    if lossless:
        from .evaluation.lossless_comparison import PROMPT_LENGTH, compare_lossless, prompts_of

        beginnings = prompts_of(make_windows(documents, tokenizer, PROMPT_LENGTH, positions, seed=0), prompts)
        compared = compare_lossless(model, beginnings, batch_size=batch_size)
        figures |= compared.figures()
        rows = {
            "lossless": f"{compared.identical:,} of {compared.tokens:,} tokens the dense model's own, "
            f"{compared.ties:,} ties, {compared.differing - compared.ties:,} others",
            "dense passes": f"{compared.dense_passes_per_token:.3f} a token; {compared.forward_passes_per_token:.3f} "
            f"forward passes of the decoder, {compared.acceptance:.1%} of the drafts accepted",
        }
    if as_json:
        print_json(figures)
        return
    print_table(
        f"{directory} on {fidelity.positions:,} positions of {text}",
        {
            "agreement": f"{fidelity.agreement:.2%} (same likeliest token as the dense head)",
            "top-5": f"{fidelity.top5_containment:.2%} (dense argmax among the five likeliest)",
            "KL divergence": f"{fidelity.kl:.4f} nats",
            "perplexity": f"{fidelity.perplexity_dense:.2f} dense, {fidelity.perplexity_sparse:.2f} sparse",
            "calibration": f"expected error {fidelity.calibration_error_dense:.4f} dense, "
            f"{fidelity.calibration_error_sparse:.4f} sparse; log Z off by {fidelity.log_z_error:+.4f}",
            "tail": f"rank correlation {fidelity.tail_rank_correlation:.3f} with the dense logits of unscored tokens",
            "bytes read": f"{fidelity.bytes_read:.1%} of the dense head",
            **rows,
        },
    )


@app.command()
def inspect(directory: Directory) -> None:
    """Show the experts with some of their tokens, the recipe, and the figures of the conversion."""
    from .inspection import describe

    quiet()
    for line in describe(directory):
        print(line)


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Argument(help="What the model is to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, more is bolder.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    head_mode: Annotated[str, typer.Option(help="auto, sparse or dense.")] = "auto",
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Write what the dense model would, reading its head once a block.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Write text with a converted model, word by word."""
    import torch
    from transformers import TextStreamer

    from .loading import load_converted

    quiet()
    model, tokenizer = load_converted(directory, device=device, fastest=True)
    model.head_mode = head_mode  # type: ignore[assignment]  # the setter refuses what is no mode
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise InputError("the prompt is empty: write a word or two for the model to go on from")
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    model.generate(
        **inputs.to(model.device),
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        # Else as the model's generation config has it.
        lossless=lossless or None,
    )
    if (stats := model.last_generation_stats) is not None:
        print(
            f"{stats.tokens} tokens, {stats.dense_passes_per_token:.2f} dense passes a token, "
            f"{stats.acceptance:.0%} of {stats.drafted} drafts accepted",
            file=sys.stderr,
        )


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A converted model's folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; made if there is none.")],
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
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8000,
    head_mode: Annotated[str, typer.Option(help="auto, sparse or dense.")] = "auto",
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Answer what the dense model would, reading its head once a block.")
    ] = False,
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
            help="In place of DIR: a published model's shape with random weights: gemma-3-270m, gemma-3-1b, "
            "llama-3.2-1b, qwen3-0.6b, qwen2.5-0.5b or smollm2-135m."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: as the model is stored, bfloat16 with --shape.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. [default: as torch chooses]")] = None,
    batches: Annotated[str, typer.Option(help="Sequences decoded side by side.")] = "1,2,4,8,16,32,64",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of decoding; of the head it is five times as many.")] = 8,
    without: Annotated[
        list[str] | None, typer.Option(help="A baseline to leave out: int8, flashhead or hnsw; may be repeated.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure with torch.compile, too.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures: a .png or .svg file to write.")] = None,
    device: Device = "cpu",
    body: Annotated[
        str | None, typer.Option(help="int8 or int4: keep the decoder's linear layers in so many bits. [default: no]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure speed, of the head and end to end, beside the dense model and the methods of others."""
    from .bench.report import batch_sizes, tables
    from .bench.run import run_bench
    from .bench.suite import Choices

    quiet()
    choices = Choices(batch_sizes(batches), tuple(without or ()), compiled, rounds)
    figures = run_bench(directory, shape, choices, dtype=dtype, device=device, body=body, threads=threads, plot=plot)
    if as_json:
        print_json(figures)
        return
    for title, rows in tables(figures):
        print_table(title, rows)


@app.command()
def demo() -> None:
    """Convert the bundled model, measure it, and write the same text with the dense and the sparse head."""
    from .convert.demo.run import run_demo

    quiet()
    run_demo()


def main(command: Callable[[], Any] = app) -> None:
    """Run a command line: exit code 0 for done, 1 for failed, 2 for refused input."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        command()
    except TopKExpertsError as error:
        print(f"hf-topk: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # typer turns the one into the other
            raise
        print("hf-topk: interrupted; an interrupted conversion goes on with --resume", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":  # `accelerate launch -m hf_topk.cli`
    main()
