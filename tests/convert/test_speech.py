"""Speech models: converted with recordings, they transcribe as the dense model does."""

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import check_refused, run_main
from support.lossless import draft_everywhere
from support.seq2seq_models import RATE, TIMESTAMPS_FROM, tiny_speech, tiny_whisper_checkpoint, words_of_whisper
from support.spoken import FOLDER, spoken
from support.tiny_models import QUICK, VOCAB_SIZE
from transformers import (
    AutoFeatureExtractor,
    AutoModelForSpeechSeq2Seq,
    WhisperForConditionalGeneration,
    pipeline,
)

from hf_topk import TopKExpertsForSpeechSeq2Seq
from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.examples import Processor, read_examples
from hf_topk.loading import load_converted
from hf_topk.speech import read_speech
from hf_topk.targets import windows_of_examples

CHOICES: dict[str, Any] = {**QUICK, "positions": 400, "window_length": 16, "num_experts_per_tok": 4}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the dense model and the converted one."""
    folder = tmp_path_factory.mktemp("whisper")
    dense = tiny_whisper_checkpoint(folder / "dense")
    pytest.importorskip("soundfile")
    convert_checkpoint(str(dense), folder / "out", Recipe(text=str(FOLDER), **CHOICES))
    return folder


def features(converted: Path, seconds: float) -> Any:
    """What the model hears of speech: a second of it, or all if that is more."""
    extractor = AutoFeatureExtractor.from_pretrained(converted / "out")
    whole: dict[str, Any] = {"truncation": False, "padding": "longest"} if seconds > 1 else {}
    return extractor(
        spoken(seconds, RATE), sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, **whole
    )


def test_loads_as_both(converted: Path) -> None:
    model = AutoModelForSpeechSeq2Seq.from_pretrained(converted / "out")
    assert type(model) is TopKExpertsForSpeechSeq2Seq
    assert json.loads((converted / "out" / "config.json").read_text())["model_type"] == "topk_experts"
    dense = AutoModelForSpeechSeq2Seq.from_pretrained(converted / "out", config=model.config.text_config)
    assert type(dense) is WhisperForConditionalGeneration


@pytest.mark.slow
def test_long_speech_has_the_same_segments_lossless(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_everywhere(monkeypatch)
    long = features(converted, 4.5)
    segments = []
    for folder, choices in (("dense", {}), ("out", {"lossless": True})):
        model = AutoModelForSpeechSeq2Seq.from_pretrained(converted / folder)
        written = model.generate(**long, return_timestamps=True, return_segments=True, **choices)["segments"][0]
        segments.append([(one["start"].item(), one["end"].item(), one["tokens"].tolist()) for one in written])
    assert segments[0] == segments[1]
    assert len(segments[0]) > 4
    assert segments[0][-1][1] > 3
    assert model.last_generation_stats.drafted > 0


@pytest.mark.parametrize(
    ("seconds", "choices"),
    [(0.8, {}), (0.8, {"return_timestamps": True}), (4.5, {"return_timestamps": True})],
    ids=["text", "timestamps", "long"],
)
def test_only_prompts_have_logits_of_all_tokens(
    converted: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, choices: dict[str, Any]
) -> None:
    """And the tokens are those that Whisper's logits processors leave of these logits."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained(converted / "out")
    model.head_mode = "sparse"
    model.generation_config.suppress_tokens = [4, 5, 6, 20, 31, 40, 41]
    model.generation_config.begin_suppress_tokens = [0, 7]
    heard = features(converted, seconds)
    sizes: list[int] = []
    logits = model.head.logits
    monkeypatch.setattr(model.head, "logits", lambda hidden: sizes.append(hidden.shape[1]) or logits(hidden))
    tokens = model.generate(**heard, **choices).tolist()
    prompts = len(sizes)
    with monkeypatch.context() as patch:
        patch.setattr("hf_topk.model.modeling_topk_experts.can_choose", lambda *_: False)
        assert model.generate(**heard, **choices).tolist() == tokens
    steps = len(sizes) - prompts
    assert steps > 3 * prompts


def test_the_speech_pipeline_recognises_it_as_whisper(converted: Path) -> None:
    texts = []
    for folder in ("dense", "out"):
        model = AutoModelForSpeechSeq2Seq.from_pretrained(converted / folder)
        transcribe = pipeline(
            "automatic-speech-recognition",
            model=model,
            tokenizer=words_of_whisper(),
            feature_extractor=AutoFeatureExtractor.from_pretrained(converted / folder),
        )
        assert transcribe.type == "seq2seq_whisper"
        if folder == "out":
            model.num_experts_per_tok = model.head.num_experts
        texts.append(transcribe(spoken(0.8, RATE), generate_kwargs={"num_beams": 1})["text"])
    assert texts[0] == texts[1] != ""


def test_a_transcript_follows_the_model_s_prompt(converted: Path, tmp_path: Path) -> None:
    dense = AutoModelForSpeechSeq2Seq.from_pretrained(converted / "dense")
    folder = tiny_speech(tmp_path / "speech", files=2, transcripts=1)
    examples, _ = read_examples(str(folder), dense.config, Processor.from_pretrained(converted / "dense"), 16, seed=0)
    given, own = sorted(windows_of_examples(dense, examples, 16), key=lambda one: one.document)
    assert given.token_ids[given.first + 1 :] == (36, 37, 38)
    assert given.followers == (36, 37, 38, 0)
    assert own.positions == len(own.followers) > 3
    assert given.token_ids[: given.first + 1] == own.token_ids[: own.first + 1]


def test_evaluate_prints_the_word_error_rate_of_each_way(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jiwer")
    folder = tiny_speech(tmp_path / "speech", files=4, transcripts=4)
    assert run_main(monkeypatch, "evaluate", converted / "out", "--text", folder, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["scores"]["WER"]["lossless"] == figures["scores"]["WER"]["dense"] > 0
    assert figures["same_as_dense"]["lossless"] == figures["sources"] == 4
    assert 0 <= figures["agreement_along_output"] <= 1


def test_generate_transcribes_a_file(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Piece by piece, as it is longer than the model's input."""
    out = shutil.copytree(converted / "out", tmp_path / "out")
    generation = json.loads((out / "generation_config.json").read_text())
    suppressed = {"suppress_tokens": list(range(TIMESTAMPS_FROM - 1, VOCAB_SIZE))}
    (out / "generation_config.json").write_text(json.dumps(generation | suppressed))
    model, processor = load_converted(str(out))
    file, texts = FOLDER / "de-0.flac", []
    for one in read_speech(str(file), RATE, seconds=1):
        heard = processor.feature_extractor(one.samples, sampling_rate=RATE, return_tensors="pt")
        tokens = model.generate(**heard, max_new_tokens=12)[0]
        texts.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    assert run_main(monkeypatch, "generate", out, file, "--max-new-tokens", 12) == 0
    assert capsys.readouterr().out.split() == " ".join(texts).split()
    assert len(texts) == 4


@pytest.mark.slow
def test_bench(converted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--rounds", 1, "--batches", 1, "--without", "int8", "--without", "hnsw", "--without", "flashhead")
    assert run_main(monkeypatch, "bench", converted / "out", *options) == 0
    assert "of the ceiling" in capsys.readouterr().out


def test_serve_is_refused(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_topk.serving.is_serve_available", lambda: True)
    check_refused(monkeypatch, capsys, "serve", converted / "out", parts=("has an encoder", "hf-topk generate"))


def test_reads_speech_at_the_given_rate(tmp_path: Path) -> None:
    tone = np.sin(np.arange(22_050) * 2 * np.pi * 440 / 22_050)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(22_050)
        file.writeframes((np.stack([tone, tone], axis=1) * 2**14).astype("<i2").tobytes())
    (recording,) = read_speech(str(tmp_path), RATE, seconds=30)
    assert len(recording.samples) == RATE
    expected = 0.5 * np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE)
    assert np.abs(recording.samples - expected)[100:-100].max() < 1e-3
    pieces = read_speech(str(tmp_path), RATE, seconds=0.4)
    assert [len(piece.samples) for piece in pieces] == [6400, 6400, 3200]


@pytest.mark.parametrize(
    ("content", "parts"), [(None, ("no recordings",)), (b"not a sound", ("not a valid recording", "x.wav"))]
)
def test_invalid_recordings_are_refused(
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    parts: tuple[str, ...],
) -> None:
    pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    Path("speech").mkdir()
    if content is not None:
        Path("speech", "x.wav").write_bytes(content)
    check_refused(monkeypatch, capsys, "convert", converted / "dense", "out", "--text", "speech", parts=parts)


def test_bundled_texts_are_refused(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(monkeypatch, capsys, "convert", converted / "dense", "out", parts=("give --text", ".wav or .flac"))
