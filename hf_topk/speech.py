"""Reads recordings of speech from a folder, with their transcripts if there are any."""

import hashlib
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from .model.errors import InputError, one_line
from .progress import progress_once_slow

INSTALL_HINT = "pip install 'hf-topk[speech]'"
ENDINGS = (".wav", ".flac")
SHORTEST = 0.1  # seconds of a piece; shorter ones contain no word


@dataclass(frozen=True)
class Recording:
    """A piece of speech that fits the model's input.

    Attributes:
        file: index of its file.
        samples: mono, fp32 [n], from -1 to 1.
        transcript: its text; None if there is none.
    """

    file: int
    samples: Any
    transcript: str | None


def read_speech(folder: str, rate: int, seconds: float) -> list[Recording]:
    """Read .wav and .flac files; the transcript of NAME.wav is NAME.txt, if there is one.

    Args:
        folder: of recordings, searched recursively and in sorted order, without hidden files; or a single file.
        rate: the model's sampling rate, in Hz.
        seconds: the model's longest input. Longer files are cut, and their transcripts ignored.

    Raises:
        InputError: when there is no such folder, no recording in it, or a file cannot be read.
    """
    files, recordings = _files(folder), []
    with progress_once_slow("Reading speech", len(files), "files") as advance:
        for number, file in enumerate(files):
            samples = _resampled(*_samples(file), rate)
            pieces = list(_pieces(samples, int(rate * seconds), int(rate * SHORTEST)))
            transcript = _transcript(file) if len(pieces) == 1 else None
            recordings += [Recording(number, piece, transcript) for piece in pieces]
            advance()
    if not recordings:
        raise InputError(f"the recordings in {folder} are all shorter than {SHORTEST} s: give longer ones")
    return recordings


def fingerprint(recordings: Sequence[Recording]) -> str:
    """Return the SHA-256, in hexadecimal, of recordings and their transcripts."""
    digest = hashlib.sha256()
    for one in recordings:
        digest.update(len(one.samples).to_bytes(8, "big") + one.samples.tobytes())
        digest.update(repr((one.file, one.transcript)).encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()


def _files(folder: str) -> list[Path]:
    path = Path(folder).expanduser()
    if path.is_file() and path.suffix.lower() in ENDINGS:
        return [path]
    if not path.is_dir():
        raise InputError(f"there is no folder {folder} of recordings: give one of .wav or .flac files")
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in ENDINGS and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise InputError(f"the folder {folder} has no recordings: give one of .wav or .flac files")
    return files


def _samples(file: Path) -> tuple[Any, int]:
    """A file's samples, fp32 [n, channels], and its sampling rate in Hz."""
    if file.suffix.lower() == ".wav" and (plain := _plain_wave(file)) is not None:
        return plain
    try:
        import soundfile
    except ImportError as error:
        raise InputError(f"{file} cannot be read without soundfile: {INSTALL_HINT}") from error
    try:
        samples, rate = soundfile.read(str(file), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(f"{file} is not a valid recording ({one_line(error)}): copy it again") from error
    return samples, rate


def _plain_wave(file: Path) -> tuple[Any, int] | None:
    """Samples and rate of a 16-bit .wav file, read with Python's own library; None for other formats."""
    try:
        with wave.open(str(file), "rb") as sound:
            if sound.getsampwidth() != 2:
                return None
            samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2")
            channels, rate = sound.getnchannels(), sound.getframerate()
    except (wave.Error, EOFError):
        return None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): check its permissions") from error
    whole = samples[: len(samples) // channels * channels]
    return whole.reshape(-1, channels).astype(np.float32) / 2**15, rate


def _resampled(samples: Any, rate: int, wanted: int) -> Any:
    """Mono samples at another rate: fp32 [n, channels] to [m]."""
    mono = samples.mean(axis=1)
    if rate == wanted:
        return mono
    from scipy.signal import resample_poly

    common = gcd(rate, wanted)
    return resample_poly(mono, wanted // common, rate // common).astype(np.float32)


def _pieces(samples: Any, longest: int, shortest: int) -> Iterator[Any]:
    for start in range(0, len(samples), longest):
        piece = samples[start : start + longest]
        if len(piece) >= shortest:
            yield piece


def _transcript(file: Path) -> str | None:
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return None
    try:
        return " ".join(beside.read_text(encoding="utf-8").split()) or None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the transcript {beside} cannot be read as UTF-8 text: fix or remove it") from error
