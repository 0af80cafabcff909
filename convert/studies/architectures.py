"""Converts a tiny random model of every type in Transformers, and reports the results.

`make study NAME=architectures` prints the table of docs/architectures.md.
"""

import dataclasses
import io
import json
import multiprocessing
import random
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)
from transformers.utils import logging

from hf_topk.cli import main
from hf_topk.convert.recipe import Recipe
from hf_topk.convert.run import convert_checkpoint
from hf_topk.model.cache_rollback import cache_among, why_not_croppable
from hf_topk.model.errors import InputError, TopKExpertsError, one_line
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.progress import progress
from studies.checks import are_close, check, every_draft
from studies.encoder_decoders import check_encoder_decoder, tiny_encoder_decoder
from studies.tiny_models import FIRST_OTHER_ID, PADDING, PROBE, VOCAB_SIZE, tiny_model

Kind = Literal["text", "images and text", "source and target text", "speech"]
Outcome = Literal["passes", "refused", "fails", "is not built"]

AUTO_CLASSES: dict[Kind, Any] = {
    "text": AutoModelForCausalLM,
    "images and text": AutoModelForImageTextToText,
    "source and target text": AutoModelForSeq2SeqLM,
    "speech": AutoModelForSpeechSeq2Seq,
}
TYPES: dict[Kind, Any] = {
    "text": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "images and text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "source and target text": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech": MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
RECIPE = Recipe(
    positions=512,
    window_length=8,
    held_out=0.2,
    expert_size=16,
    distill_steps=2,
    router_rank=4,
    tail_rank=4,
    sparse_max_positions=16,
)
WITH_ENCODER: tuple[Kind, ...] = ("source and target text", "speech")
NEW_TOKENS = 12
SECONDS = 120  # timeout of one type
# Raised by Transformers when a tiny model cannot be built, or needs more inputs than text.
NOT_BUILT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Result:
    """The result of a model type.

    Attributes:
        model_type: its name in Transformers.
        class_name: of the dense model.
        outcome: whether the model was built, converted, and passed the checks.
        reason: if not, why.
    """

    model_type: str
    class_name: str
    outcome: Outcome
    reason: str = ""


def model_types(kind: Kind) -> dict[str, str]:
    """Class names of all model types of a kind."""
    return dict(TYPES[kind])


def check_conversion(dense: PreTrainedModel, folder: Path) -> None:
    """Convert a dense model on disk, and check the result.

    With all experts its logits and text are the dense model's; it can be saved again; ties stay; lossless decoding
    gives the dense model's tokens; and its folder loads as the dense model.

    Args:
        dense: a tiny dense model.
        folder: an empty folder.

    Raises:
        InputError: when the model is refused.
        TopKExpertsError: when a check fails.
    """
    expected, is_tied = _logits(dense), _is_tied(dense)
    dense.save_pretrained(folder / "dense")
    recipe = dataclasses.replace(RECIPE, text=str(_write_text(dense, folder)))
    convert_checkpoint(str(folder / "dense"), folder / "converted", recipe)
    converted = _load(folder / "converted", AutoModelForCausalLM)
    converted.head_mode = "sparse"
    converted.save_pretrained(folder / "again")
    again = _load(folder / "again", AutoModelForCausalLM)
    check(are_close(_logits(again), _logits(converted)), "saved and loaded again it gives different logits")
    check(_is_tied(converted) == _is_tied(again) == is_tied, "its embeddings are tied differently")
    for one in (folder / "converted", folder / "again"):
        config = AutoConfig.from_pretrained(one).text_config
        check(
            are_close(_logits(_load(one, type(dense), config=config)), expected),
            "loaded as the dense model it gives different logits",
        )
    converted.head.num_experts_per_tok = converted.head.num_experts
    check(are_close(_logits(converted), expected), "with all experts its logits are not the dense model's")
    text = _text(dense)
    check(_text(converted) == text, "with all experts its text is not the dense model's")
    _check_lossless(converted, text)


def _write_text(dense: PreTrainedModel, folder: Path) -> Path:
    """Write a tokenizer of single characters beside the dense model, and a file of random documents."""
    vocab_size = getattr(dense.config.get_text_config(), "vocab_size", None) or VOCAB_SIZE
    characters = [chr(ord("A") + number) for number in range(vocab_size)]
    # BPE without merges: the tokenizer classes of all model types can read it.
    vocabulary = {character: number for number, character in enumerate(characters)}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[], unk_token=characters[0]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "dense")
    generator = random.Random(0)
    documents = [
        "".join(generator.choices(characters[:FIRST_OTHER_ID], k=RECIPE.window_length)) for _ in range(RECIPE.positions)
    ]
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents), encoding="utf-8")
    return text


def _check_lossless(converted: TopKExpertsForCausalLM, text: list[list[int]]) -> None:
    """Check that lossless decoding drafts wherever the cache can be cropped, and gives the dense model's tokens."""
    converted.head.num_experts_per_tok = converted.head.num_experts // 2
    with every_draft():
        written = _continued(converted, lossless=True, return_dict_in_generate=True)
    check(written.sequences.tolist() == text, "its lossless text is not the dense model's")
    stats, cache = converted.last_generation_stats, cache_among(written)
    has_drafted = stats is not None and stats.drafted > 0
    check(has_drafted or why_not_croppable(cache) is not None, "its lossless text is not drafted")


def _load(folder: Path, loader: Any, **choices: Any) -> Any:
    model, found = loader.from_pretrained(folder, output_loading_info=True, **choices)
    wrong = found["missing_keys"] or found["mismatched_keys"]
    if isinstance(model, TopKExpertsForCausalLM):
        wrong = wrong or found["unexpected_keys"]
    check(not wrong, f"a tensor is not loaded: {min(map(str, wrong), default='')}")
    return model


@torch.inference_mode()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=PROBE).logits


def _text(model: Any) -> list[list[int]]:
    """Greedy continuations."""
    return _continued(model).tolist()


def _continued(model: Any, **choices: Any) -> Any:
    return model.generate(
        PROBE, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=PADDING, **choices
    )


def _is_tied(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()
    return head is not None and model.get_input_embeddings().weight is head.weight


def try_type(kind: Kind, model_type: str) -> Result:
    """Build, convert and check a model type in this process.

    Args:
        kind: its inputs.
        model_type: its name in Transformers.
    """
    name = model_types(kind)[model_type]
    try:
        dense = (tiny_encoder_decoder if kind in WITH_ENCODER else tiny_model)(AUTO_CLASSES[kind], model_type)
    except NOT_BUILT as error:
        return Result(model_type, name, "is not built", one_line(error))
    try:
        with tempfile.TemporaryDirectory() as folder:
            if dense.config.is_encoder_decoder:
                check_encoder_decoder(dense, RECIPE, Path(folder))
            else:
                check_conversion(dense, Path(folder))
    except InputError as error:
        return Result(model_type, name, "refused", one_line(error).replace(f"{folder}/dense", "it"))
    except (*NOT_BUILT, TopKExpertsError) as error:
        return Result(model_type, name, "fails", one_line(error))
    return Result(model_type, name, "passes")


def try_types(kind: Kind, names: Iterable[str]) -> list[Result]:
    """Try model types, each in a process of its own, so that a crash or a hang does not stop the others.

    Args:
        kind: their inputs.
        names: of the types in Transformers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([convert_checkpoint.__module__])
    names = list(names)
    results = []
    with progress(f"Converting models of {kind}", len(names), "types") as advance:
        for name in names:
            results.append(_in_a_process(context, kind, name))
            advance()
    return results


def _in_a_process(context: Any, kind: Kind, model_type: str) -> Result:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_and_send, args=(sender, kind, model_type))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()
        reason = f"takes more than {SECONDS} s"
    except EOFError:
        reason = "its process crashed"
    finally:
        process.kill()
        process.join()
    return Result(model_type, model_types(kind)[model_type], "fails", reason)


def _try_and_send(sender: Connection, kind: Kind, model_type: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        sender.send(try_type(kind, model_type))


def as_markdown(results: dict[Kind, list[Result]]) -> str:
    """The page of docs/architectures.md.

    Args:
        results: of each kind.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    lines = [
        "# Architectures",
        "",
        "A tiny random model of each type is converted on disk, with 6 experts and 4 always-on tokens of 100, and "
        "checked: with all experts",
        "its logits and its text are the dense model's; so is the lossless text, drafted with half of the experts; "
        "saved again",
        "it is the same; ties stay; the folder loads as the dense model. One command makes this page:",
        "",
        "```",
        'make study NAME=architectures ARGS="--write docs/architectures.md"',
        "```",
        "",
        f"With {versions}. *Is not built*: Transformers builds no model from the tiny configuration, or one that does "
        "not generate",
        "text from text alone; or it needs the package timm, which was not installed.",
    ]
    for kind, some in results.items():
        lines += ["", f"## Models of {kind}", "", _summary(some), "", "| type | class | result |", "|---|---|---|"]
        lines += [f"| {one.model_type} | {one.class_name} | {_cell(one)} |" for one in some]
    return "\n".join(lines) + "\n"


def _summary(results: list[Result]) -> str:
    built = sum(one.outcome != "is not built" for one in results)
    passed = sum(one.outcome == "passes" for one in results)
    share = f" ({passed / built:.1%})" if built else ""
    return f"Of {len(results)} types {built} are built; of these {passed} pass{share}."


def _cell(result: Result) -> str:
    reason = result.reason.replace("|", "\\|").replace("<", "&lt;")
    return f"{result.outcome}: {reason}" if reason else result.outcome


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def architectures(
    types: Annotated[
        list[str] | None, typer.Argument(metavar="[TYPE]...", help="Model types; all if left out.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="The file to write the table to.")] = None,
) -> None:
    """Convert each model type, and print the results as a table."""
    kinds: tuple[Kind, ...] = (*AUTO_CLASSES,)
    known = {name for kind in kinds for name in model_types(kind)}
    unknown = [name for name in types or () if name not in known]
    if unknown:
        raise InputError(f"Transformers has no model type '{unknown[0]}' that generates text")
    results = {
        kind: try_types(kind, [name for name in model_types(kind) if not types or name in types]) for kind in kinds
    }
    page = as_markdown({kind: some for kind, some in results.items() if some})
    if write is None:
        print(page, end="")
        return
    partial = write.with_name(f".{write.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(write)


if __name__ == "__main__":
    main(app)
