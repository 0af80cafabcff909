"""Sentences with numbers and names in English and German, spoken by espeak-ng; the files lie in `spoken/`.

They were made by `PYTHONPATH=tests .venv/bin/python -m support.spoken` (`apt-get install espeak-ng`). NAME.txt holds
what NAME.flac says.
"""

import io
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from hf_topk.speech import read_speech

FOLDER = Path(__file__).with_name("spoken")
RATE, WORDS_A_MINUTE = 8000, 175  # so that the files are small
SENTENCES = {
    "en-us": (
        "Doctor Adams paid 42 dollars and 15 cents.",
        "Flight 308 to Oslo leaves at half past seven.",
        "Call Maria Lopez on 555 0199.",
        "The train from Boston was 12 minutes late.",
        "Room 7 is on the third floor, Mister Chen.",
        "In 1969 Neil Armstrong walked on the moon.",
    ),
    "de": (
        "Frau Weber wohnt seit 2014 in Bremen.",
        "Am 17. Juni traf sie Herrn Schulz.",
        "Der Zug nach Wien hält auf Gleis 9.",
        "Jonas kaufte drei Kilo Äpfel für 8 Euro.",
    ),
}


def spoken(seconds: float, rate: int) -> Any:
    """The files one after the other: fp32 [seconds x rate].

    Args:
        seconds: of speech, at most what the files hold.
        rate: the sampling rate, in Hz.
    """
    samples = np.concatenate([one.samples for one in read_speech(str(FOLDER), rate, seconds=60)])
    return samples[: int(seconds * rate)]


def make() -> None:
    """Speak the sentences to files, and write beside each what it says."""
    import soundfile
    from scipy.signal import resample_poly

    FOLDER.mkdir(exist_ok=True)
    for voice, sentences in SENTENCES.items():
        for number, sentence in enumerate(sentences):
            command = ["espeak-ng", "-v", voice, "-s", str(WORDS_A_MINUTE), "--stdout", sentence]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            samples, rate = soundfile.read(io.BytesIO(made))
            file = FOLDER / f"{voice}-{number}.flac"
            soundfile.write(file, resample_poly(samples, RATE, rate), RATE)
            file.with_suffix(".txt").write_text(sentence + "\n", encoding="utf-8")


if __name__ == "__main__":
    make()
