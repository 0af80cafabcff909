"""Loads the dense model, on one device or spread by a device map."""

import os
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hf_topk.compute_dtype import faster_dtype
from hf_topk.loading import find_device
from hf_topk.model.dense_model import config_for, dense_class_of, name_of_head
from hf_topk.model.errors import InputError, one_line

from .source import Source

DeviceMap = str | dict[str, Any]

SHARE_OF_RAM = 0.5  # the most that a model may take in a larger dtype than its own
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(device_map: DeviceMap | None) -> None:
    """Refuse a device map that this machine cannot use.

    Args:
        device_map: as `from_pretrained` takes it.

    Raises:
        InputError: when accelerate is not installed, or the map is neither a known strategy nor a device here.
    """
    if device_map is None:
        return
    if find_spec("accelerate") is None:
        raise InputError("a device map needs accelerate: pip install 'hf-topk[accelerate]'")
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS and not _is_device(device_map):
        raise InputError(
            f"device map '{device_map}' is neither one of {', '.join(DEVICE_MAPS)} nor a device of this machine, "
            "such as cpu or cuda:0"
        )


def _is_device(name: str) -> bool:
    try:
        return find_device(name).type != "meta"
    except InputError:
        return False


def stored_type(source: Source) -> torch.dtype:
    """The dtype of a dense checkpoint: from its configuration, or else of its first float tensor.

    Args:
        source: the dense checkpoint.
    """
    config = AutoConfig.from_pretrained(source.folder)
    named = config.dtype or config.get_text_config().dtype
    return named if isinstance(named, torch.dtype) else source.first_float_type()


def dtype_to_compute_in(source: Source, device_map: DeviceMap | None) -> torch.dtype:
    """The dtype to run a dense checkpoint in: float32 if that is faster than its own and fits in RAM.

    Args:
        source: the dense checkpoint.
        device_map: with one, the checkpoint's own dtype, as memory is then scarce.
    """
    own = stored_type(source)
    parameters = source.nbytes() // own.itemsize
    if device_map is not None or torch.float32.itemsize * parameters > SHARE_OF_RAM * _ram():
        return own
    return faster_dtype(own, torch.device("cpu"))


def _ram() -> int:
    """Bytes of RAM of this machine; 0 if unknown."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def load_dense(
    source: Source, device_map: DeviceMap | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a dense checkpoint.

    Args:
        source: the dense checkpoint.
        device_map: as `from_pretrained` takes it; RAM if None. The head and the input embeddings stay in memory even if
            it offloads them.
        dtype: to compute in; the checkpoint's own if None.

    Raises:
        InputError: when a tensor is missing or has the wrong shape, or memory runs out.
    """
    config = AutoConfig.from_pretrained(source.folder)
    dense_class = dense_class_of(config)
    config = config_for(dense_class, config)
    try:
        loaded: Any = dense_class.from_pretrained(
            source.folder, config=config, dtype=dtype or "auto", device_map=device_map, output_loading_info=True
        )
        dense, found = loaded
    except torch.OutOfMemoryError as error:
        raise InputError(f"{source.name} is too large for its device: give --device-map auto") from error
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise InputError(
            f"the weights of {source.name} do not load ({one_line(error)}): fetch the model again"
        ) from error
    _check_complete(source, dense, found)
    keep_ends_in_memory(dense)
    return dense


def _check_complete(source: Source, dense: PreTrainedModel, found: dict[str, Any]) -> None:
    if not found["missing_keys"]:
        return
    missing = f"'{min(found['missing_keys'])}' is missing"
    if found["unexpected_keys"]:
        raise InputError(
            f"the weights of {source.name} are not those of a {type(dense).__name__}: {missing}, and "
            f"'{min(found['unexpected_keys'])}' has no place in it; check `architectures` in config.json"
        )
    if found["missing_keys"] == {f"{name_of_head(dense)}.weight"}:
        raise InputError(
            f"{source.name} has no head ({missing}), and its configuration does not tie one to the input embeddings: "
            "if they are one tensor, set `tie_word_embeddings` to true in config.json, else fetch the model again"
        )
    raise InputError(f"the weights of {source.name} are not complete: {missing}; fetch the model again")


def keep_ends_in_memory(model: PreTrainedModel) -> None:
    """Load the input embeddings and the head back into memory if a device map has offloaded them; ties stay.

    A conversion reads the head's rows throughout, and sends its inputs to the device of the embeddings.

    Args:
        model: dense or converted, from `from_pretrained`.

    Raises:
        InputError: when they are tied, and the map puts them on different devices.
    """
    offloaded = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if _is_offloaded(end)]
    try:
        for end in offloaded:
            hook = cast(Any, end)._hf_hook
            hook.pre_forward(end)
            hook.offload = False
    except KeyError as error:
        raise InputError(
            f"the device map puts {error} and the weight it is tied to on different devices: give them the same one"
        ) from error
    if offloaded:
        model.tie_weights()


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate reloads a module's tensors in every forward pass."""
    return getattr(getattr(module, "_hf_hook", None), "offload", False)
