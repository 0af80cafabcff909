"""Finds the dense checkpoint, in a folder or on the Hub, and checks its files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_topk.model.errors import InputError
from hf_topk.progress import progress

DEMO = Path(__file__).parent / "demo" / "model"
BYTES_AT_ONCE = 1 << 24
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = (
    *("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.merges", "*.md"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)


@dataclass(frozen=True)
class Source:
    """A dense checkpoint on this machine.

    Attributes:
        name: as the user gave it.
        folder: of its files.
        shards: its safetensors files, sorted by name.
        weight_map: file name of each tensor.
    """

    name: str
    folder: Path
    shards: tuple[Path, ...]
    weight_map: dict[str, str]

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the files that a conversion depends on: configurations, tokenizer and weights."""
        digest = hashlib.sha256()
        for companion in sorted(self.folder.iterdir()):
            if companion.suffix in (".json", ".txt", ".model") and companion.is_file():
                digest.update(companion.name.encode() + hashlib.sha256(companion.read_bytes()).digest())
        with progress("Reading the checkpoint", self.nbytes(), "bytes") as advance:
            for shard in self.shards:
                with shard.open("rb") as file:
                    while block := file.read(BYTES_AT_ONCE):
                        digest.update(block)
                        advance(len(block))
        return digest.hexdigest()

    def first_float_type(self) -> torch.dtype:
        """The dtype of the first float tensor; float32 if there is none."""
        for shard in self.shards:
            with safe_open(shard, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if (dtype := tensors.get_slice(name)[:0].dtype).is_floating_point:
                        return dtype
        return torch.float32

    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.stat().st_size for shard in self.shards)


def find_folder(model: str | None) -> Path:
    """The folder of a model: the bundled one, a local one, or that of a Hub repository without its weights.

    Args:
        model: a folder, a repository of the Hub, or None for the bundled demo model.

    Raises:
        InputError: when there is no such model, or it cannot be downloaded.
    """
    if model is None:
        return DEMO
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{model} is a file, not a model: give its folder")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise InputError(f"no such model: there is no folder {model}")
    return _download(model, NOT_WEIGHTS)


def open_source(name: str, folder: Path) -> Source:
    """Find the weights of a model without reading them.

    Args:
        name: as the user gave it.
        folder: of its files; missing weights are downloaded from the Hub.

    Raises:
        InputError: when there are no safetensors weights, or they are damaged.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not Path(name).expanduser().is_dir() and folder != DEMO:  # even if it has weights: a download may be incomplete
        # By name: the same weights may be there twice, for other programs, such as in consolidated.safetensors.
        named = set(_weight_map(index).values()) if index.is_file() else set()
        folder = _download(name, (*NOT_WEIGHTS, SAFE_WEIGHTS_NAME, *named))
        index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        shards = [folder / SAFE_WEIGHTS_NAME]
    elif index.is_file():
        shards = [folder / file for file in sorted(set(_weight_map(index).values()))]
    else:
        raise _no_weights(name, folder)
    weight_map = {tensor: shard.name for shard in shards for tensor in _tensor_names(shard)}
    if index.is_file() and shards[0].name != SAFE_WEIGHTS_NAME:
        missing = sorted(set(_weight_map(index)) - set(weight_map))
        if missing:
            raise InputError(f"{index} lists the tensor '{missing[0]}', but no shard has it: fetch the model again")
    return Source(name, folder, tuple(shards), weight_map)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: when the file is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): fetch the model again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged (not a JSON object): fetch the model again")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} is damaged (no weight map): fetch the model again")
    return weight_map


def _tensor_names(shard: Path) -> list[str]:
    if not shard.is_file():
        raise InputError(f"the weights are not complete: {shard} is missing; fetch the model again")
    try:
        with safe_open(shard, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{shard} is damaged or cut short ({error}): fetch the model again") from error


def _no_weights(name: str, folder: Path) -> InputError:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_ENDINGS)
    if pickles:
        return InputError(
            f"{name} has pickled weights ({pickles[0]}), which can run code when they are loaded: convert them first "
            'with python -c "from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{folder}', dtype='auto').save_pretrained('NEW_FOLDER')\""
        )
    return InputError(f"{name} has no weights: no {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} in {folder}")


def _download(repository: str, patterns: tuple[str, ...]) -> Path:
    no_model = f"no such model: there is no folder '{repository}' here"
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise InputError(f"{no_model}, and it is not a valid name of a repository") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"{no_model}, and the Hub cannot be reached to look for a repository: check the name and the network"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(f"{no_model}, and the Hub refuses it ({_first_line(error)})") from error
    except OSError as error:
        raise InputError(f"{no_model}, and the download from the Hub failed ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
