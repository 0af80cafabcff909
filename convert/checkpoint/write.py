"""Writes the folder of a converted model, completely or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_topk.console import as_json
from hf_topk.evaluation.observations import OBSERVATIONS_FILE
from hf_topk.inspection.page import REPORT_FILE
from hf_topk.model.errors import TopKExpertsError
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.progress import Advance, progress
from hf_topk.targets import inputs_of
from hf_topk.windows import Window

from ..load_dense import DeviceMap, keep_ends_in_memory
from ..recipe import RECIPE_FILE
from ..report import Report
from ..source import BYTES_AT_ONCE, Source
from .card import write_card

COMPANION_ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".merges")
COMPANION_STARTS = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
WRITTEN_ANEW = ("config.json", "README.md", SAFE_WEIGHTS_INDEX_NAME)
METRICS_FILE = "figures.json"
PROBE_LENGTH = 8  # tokens to compare the reloaded model on


def write_checkpoint(
    report: Report, source: Source, out: Path, device_map: DeviceMap | None = None, page: str | None = None
) -> None:
    """Write a converted model to a temporary folder, verify that it reloads, and move it into place.

    The dense shards are copied byte for byte and only renumbered; the tensors that conversion added get a shard of
    their own, so the folder loads as the dense model too. Not links: saving over one would change the dense checkpoint.

    Args:
        report: of the conversion.
        source: the dense checkpoint.
        out: the folder to write; an existing one is replaced in the last step.
        device_map: that the dense model was loaded with.
        page: the report as HTML, to write beside the card; None for none.

    Raises:
        TopKExpertsError: when writing fails, or the folder does not load as the same model.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    with _whole_or_nothing(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_files(report, source, partial)
        if page is not None:
            (partial / REPORT_FILE).write_text(page, encoding="utf-8")
        _verify(report, partial, device_map)
        _move(partial, out)


@contextmanager
def _whole_or_nothing(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TopKExpertsError(
            f"cannot write {error.filename or partial.parent}: {error.strerror}; "
            "fix this and run the same command with --resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_files(report: Report, source: Source, folder: Path) -> None:
    for file in sorted(source.folder.iterdir()):
        if _is_companion(file):
            shutil.copyfile(file, folder / file.name)
    count = len(source.shards) + 1
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    with progress("Copying the dense weights", source.nbytes(), "bytes") as advance:
        for shard, name in zip(source.shards, names, strict=False):
            _copy(shard, folder / name, advance)
    additions = additions_of(report.model)
    (folder / names[-1]).write_bytes(save(additions, metadata={"format": "pt"}))
    renamed = {shard.name: name for shard, name in zip(source.shards, names, strict=False)}
    weight_map = {tensor: renamed[shard] for tensor, shard in source.weight_map.items()}
    weight_map |= dict.fromkeys(additions, names[-1])
    total = sum(map(_tensor_bytes, source.shards)) + sum(tensor.nbytes for tensor in additions.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    report.model.config.architectures = [type(report.model).__name__]
    custom_object_save(report.model, folder, config=cast(Any, report.model.config))
    report.model.config.save_pretrained(folder)
    (folder / RECIPE_FILE).write_text(report.recipe.to_yaml(), encoding="utf-8")
    (folder / METRICS_FILE).write_text(as_json(report.metrics()) + "\n", encoding="utf-8")
    (folder / OBSERVATIONS_FILE).write_text(report.observations.to_json(), encoding="utf-8")
    write_card(report, source, folder)


def _tensor_bytes(shard: Path) -> int:
    """Bytes of a safetensors file without its header, whose length is in the first eight bytes."""
    with shard.open("rb") as file:
        return shard.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _is_companion(file: Path) -> bool:
    """Whether to copy a file of the dense checkpoint: tokenizer, generation config, chat template, licence."""
    if not file.is_file() or file.name in WRITTEN_ANEW or file.name.startswith("."):
        return False
    return file.suffix in COMPANION_ENDINGS or file.name.upper().startswith(COMPANION_STARTS)


def _copy(file: Path, target: Path, advance: Advance) -> None:
    with file.open("rb") as source, target.open("wb") as out:
        while block := source.read(BYTES_AT_ONCE):
            out.write(block)
            advance(len(block))


def additions_of(model: TopKExpertsForCausalLM) -> dict[str, Tensor]:
    """The tensors that conversion added, by their names on disk."""
    prefix = f"{model.base_model_prefix}.{model.head_name}."
    additions = {f"{prefix}{name}": tensor for name, tensor in model.head.additions().items()}
    dtype = model.head.stored_type
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in revert_weight_conversion(model, additions).items()
    }


@torch.inference_mode()
def _verify(report: Report, folder: Path, device_map: DeviceMap | None) -> None:
    """Load the folder, and compare its sparse and dense logits with those of the model in memory."""
    if isinstance(device_map, dict):
        prefix = report.model.base_model_prefix
        device_map = {f"{prefix}.{name}" if name else name: device for name, device in device_map.items()}
    loaded: Any = getattr(transformers, report.model.auto_class).from_pretrained(
        folder, dtype=report.model.dtype, device_map=device_map, output_loading_info=True
    )
    reloaded, found = loaded
    keep_ends_in_memory(reloaded)
    # Other unexpected keys are unused tensors of the dense shards; loading the dense model has warned of them.
    prefix = f"{reloaded.base_model_prefix}.{reloaded.head_name}."
    added = {f"{prefix}{name}" for name in report.model.head.additions()}
    wrong = found["missing_keys"] or found["unexpected_keys"] & added or found["mismatched_keys"]
    if wrong:
        raise TopKExpertsError(f"the written model does not load completely ({min(wrong)}): please report this")
    for mode in ("sparse", "dense"):
        expected, got = (_logits(model, report.probe, mode) for model in (report.model, reloaded))
        if not torch.allclose(expected, got, rtol=1e-3, atol=1e-3):
            raise TopKExpertsError(f"the written model gives different {mode} logits: please report this")
    ties = [model.head.weight is model.get_input_embeddings().weight for model in (report.model, reloaded)]
    if ties[0] != ties[1]:
        raise TopKExpertsError("the written model ties its embeddings differently: please report this")


def _logits(model: TopKExpertsForCausalLM, probe: Window | None, mode: Any) -> Tensor:
    token_ids = torch.arange(PROBE_LENGTH) % model.head.out_features
    inputs = inputs_of([probe or Window(0, tuple(token_ids.tolist()))], model)[0]
    before, model.head_mode = model.head_mode, mode
    try:
        return model(**inputs).logits.float().cpu().nan_to_num()
    finally:
        model.head_mode = before


def _move(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.replace(out)
        return
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if _is_inside(out):  # a shell that is in the folder stays in it, and not in one that is gone
        replaced.mkdir()
        _move_contents(out, replaced)
        _move_contents(partial, out)
    else:
        out.replace(replaced)
        partial.replace(out)
    shutil.rmtree(replaced, ignore_errors=True)  # network file systems keep what another process has open


def _is_inside(folder: Path) -> bool:
    return Path.cwd().is_relative_to(folder.resolve())


def _move_contents(source: Path, target: Path) -> None:
    for path in list(source.iterdir()):
        path.replace(target / path.name)
