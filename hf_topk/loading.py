"""Loads a converted model and its tokenizer for the commands, with helpful errors."""

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from .compute_dtype import faster_dtype
from .examples import Processor, is_speech_model
from .model.configuration_topk_experts import TopKExpertsConfig
from .model.encoder_decoder import converted_class
from .model.errors import InputError, one_line
from .model.modeling_topk_experts import TopKExpertsForCausalLM

DTYPES = ("auto", "float32", "bfloat16")


def load_converted(
    name: str,
    num_experts_per_tok: int | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    *,
    fastest_for: int | None = None,
) -> tuple[TopKExpertsForCausalLM, Any]:
    """Load a converted model and its tokenizer, or its processor if it is a speech model.

    Bytes are counted in the stored dtype, whatever dtype it is loaded in.

    Args:
        name: a folder, or a repository of the Hub.
        num_experts_per_tok: k; None for the model's own.
        dtype: "float32", "bfloat16", or "auto": as the model is stored.
        device: such as "cpu" or "cuda:0", or "auto": the accelerator, if any.
        fastest_for: positions per forward pass, [`READING`] or [`DECODING`]: dtype "auto" means float32 if the device
            is faster in it than in the stored dtype. None: it means the stored dtype.

    Raises:
        InputError: when the dtype is unknown, there is no such device or converted model, its files are damaged, or
            k is out of range.
    """
    place = find_device(device)
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}': choose one of {', '.join(DTYPES)}")
    config = _config(name)
    if num_experts_per_tok is not None:
        config.num_experts_per_tok = num_experts_per_tok
    stored = config.dtype
    chooses = fastest_for is not None and dtype == "auto" and stored is not None
    try:
        loaded: Any = getattr(transformers, converted_class(config.dense_config).auto_class).from_pretrained(
            name,
            config=config,
            dtype=faster_dtype(stored, place, fastest_for) if chooses else dtype,
            output_loading_info=True,
        )
        model, found = loaded
        tokenizer: Any = (Processor if is_speech_model(config.dense_config) else AutoTokenizer).from_pretrained(name)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{name} does not load ({one_line(error)}): convert or fetch it again") from error
    if found["missing_keys"]:
        first = min(found["missing_keys"])
        raise InputError(f"{name} is not complete, '{first}' is missing: convert or fetch it again")
    if stored:
        model.head.stored_type = stored
    return model.to(place), tokenizer


def find_device(name: str) -> torch.device:
    """Find a device by name.

    Args:
        name: such as "cpu" or "cuda:0", or "auto": the accelerator, if any.

    Raises:
        InputError: when there is no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        reason = str(error).splitlines()[0]
        raise InputError(
            f"no device '{name}' ({reason}): choose auto, cpu, or a device that torch supports here"
        ) from error


def _config(name: str) -> TopKExpertsConfig:
    path = Path(name).expanduser()
    if path.is_file():
        raise InputError(f"{name} is a file, not a model: give its folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name} is not a model: there is no config.json in it")
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise InputError(f"no such model: there is no folder {name}")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        if path.is_dir():
            reason = f"the configuration of {name} cannot be read ({one_line(error)}): convert or fetch it again"
            raise InputError(reason) from error
        raise InputError(f"no such model: {name} ({one_line(error)})") from error
    if not isinstance(config, TopKExpertsConfig):
        raise InputError(
            f"{name} is a dense model ('{config.model_type}'), not a converted one: "
            "convert it first with `hf-topk convert MODEL OUT`"
        )
    return config
