"""Speech for measuring: sentences of a text, spoken to files by espeak-ng (`apt-get install espeak-ng`)."""

import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_topk.loading import load_converted
from hf_topk.model.errors import InputError
from hf_topk.progress import progress
from hf_topk.speech import read_speech

WORDS_A_MINUTE = 145
SHORTEST, LONGEST = 40, 170  # characters of a sentence
TEXTS = Path(__file__).parents[2] / "convert" / "calibration_text" / "texts"
FILES, TOGETHER, MEASURED, SECONDS = 200, 3, 200, 180
VOICES = {"english": "en-us", "german": "de", "french": "fr"}


def sentences_of(text: str) -> list[str]:
    """Sentences of a text that can be spoken in a few seconds.

    Args:
        text: prose.
    """
    found = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [one for one in found if SHORTEST <= len(one) <= LONGEST and one[0].isupper()]


def speak(sentences: list[str], folder: Path, count: int, voice: str = "english", together: int = 1) -> None:
    """Speak sentences to .wav files, and write their transcripts.

    Args:
        sentences: of a text.
        folder: where they go; what it held before is removed.
        count: of files.
        voice: one of `VOICES`.
        together: sentences in a file.

    Raises:
        InputError: when espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise InputError("speech is spoken by espeak-ng, which is not here: apt-get install espeak-ng")
    chosen = random.Random(0).sample(sentences, min(len(sentences), count * together))
    parts = [" ".join(chosen[start : start + together]) for start in range(0, len(chosen), together)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with progress("Speaking", len(parts), "files") as advance:
        for number, part in enumerate(parts):
            file = folder / f"{voice}-{number:04}.wav"
            command = ["espeak-ng", "-v", VOICES[voice], "-s", str(WORDS_A_MINUTE), "-w", str(file), part]
            subprocess.run(command, check=True)
            file.with_suffix(".txt").write_text(part + "\n", encoding="utf-8")
            advance()


def measure_speech(
    dense: Path, folder: Path, text: Path, run: Callable[..., dict[str, Any]], convert_options: list[str]
) -> dict[str, Any]:
    """Convert a speech model with bundled texts, spoken, and measure it on another spoken text.

    Args:
        dense: the dense model's folder.
        folder: where speech and the converted model go.
        text: prose to measure on; nothing is converted with it.
        run: runs one of our commands, and returns what it prints as JSON.
        convert_options: for the conversion, none for the defaults.

    Returns:
        Figures, by what they are of: conversion, speech, and long, of how many segments three minutes have, and how
        many are the same lossless.
    """
    bundled = [file.read_text(encoding="utf-8") for kind in ("prose", "modern") for file in (TEXTS / kind).iterdir()]
    speak(sentences_of("\n".join(bundled)), folder / "sample", FILES, together=TOGETHER)
    for transcript in (folder / "sample").glob("*.txt"):  # it learns along what it writes itself
        transcript.unlink()
    speak(sentences_of(text.read_text(encoding="utf-8")), folder / "speech", MEASURED)
    out = folder / "converted"
    conversion = run("convert", dense, out, "--overwrite", "--text", folder / "sample", *convert_options)
    measured = run("evaluate", out, "--text", folder / "speech", "--dtype", "float32")
    return {"conversion": conversion, "speech": measured, "long": _long_form(out, folder / "speech")}


def _long_form(converted: Path, speech: Path) -> dict[str, int]:
    """The number of segments of three minutes of speech, and of those that are the same lossless."""
    model, processor = load_converted(str(converted), dtype="float32")
    extractor = processor.feature_extractor
    recordings = read_speech(str(speech), extractor.sampling_rate, SECONDS)
    samples = np.concatenate([one.samples for one in recordings])[: SECONDS * extractor.sampling_rate]
    heard = extractor(
        samples,
        sampling_rate=extractor.sampling_rate,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )
    found = []
    for model.head_mode, lossless in (("dense", False), ("sparse", True)):
        written = model.generate(**heard, return_timestamps=True, return_segments=True, lossless=lossless)
        segments = written["segments"][0]
        found.append([(float(one["start"]), float(one["end"]), one["tokens"].tolist()) for one in segments])
    same = sum(one == other for one, other in zip(*found, strict=False))
    return {"segments": max(map(len, found)), "same": same}
