"""The Python code of docs/translation.md and docs/speech.md runs as it is printed."""

import re
from pathlib import Path

import pytest
from support.seq2seq_models import tiny_model, tiny_speech, tiny_whisper_checkpoint
from support.tiny_models import tiny_converted, tiny_tokenizer
from transformers import AutoModelForSpeechSeq2Seq

DOCS = Path(__file__).parents[2] / "docs"


def code_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL))


def test_translation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    dense, _ = tiny_model("marian")
    dense.generation_config.max_length = 12
    tiny_converted(dense).save_pretrained("out")
    tiny_tokenizer().save_pretrained("out")
    exec(code_of("translation.md"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    tiny_whisper_checkpoint(tmp_path / "out")
    tiny_converted(AutoModelForSpeechSeq2Seq.from_pretrained("out")).save_pretrained("out")
    tiny_speech(tmp_path / "speech", files=1)
    exec(code_of("speech.md").replace('"num_beams": 1', '"num_beams": 1, "max_new_tokens": 16'), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
