"""Conversion of encoder-decoders, from pairs and from sources without targets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import check_refused, run_main
from support.seq2seq_models import tiny_model, tiny_pairs
from support.tiny_models import QUICK, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForSeq2SeqLM

from hf_topk import TopKExpertsForSeq2SeqLM
from hf_topk.convert import Recipe, convert, convert_checkpoint
from hf_topk.convert.steps import generate_targets
from hf_topk.convert.steps.hidden_states import states_of_batch
from hf_topk.examples import examples_of_text
from hf_topk.model.errors import InputError
from hf_topk.pairs import Pair
from hf_topk.targets import TargetWindow, windows_of_examples

CHOICES: dict[str, Any] = {**QUICK, "positions": 400, "window_length": 12}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dense, _ = tiny_model("marian")
    return tiny_checkpoint(tmp_path / "dense", dense)


def windows_of(dense: Any, *documents: Any, window_length: int = 8) -> list[TargetWindow]:
    examples = examples_of_text(documents, tiny_tokenizer(), window_length, seed=0)
    found = [one for one in windows_of_examples(dense, examples, window_length) if one is not None]
    return sorted(found, key=lambda one: one.document)


def test_a_given_target_is_shifted_as_by_the_model() -> None:
    dense, _ = tiny_model("marian")
    (window,) = windows_of(dense, Pair("w1 w2", "w5 w6 w7"))
    assert window.source.token_ids == (3, 4)
    assert window.token_ids == (1, 7, 8)  # from the model's start token
    assert window.followers == (7, 8, 9)
    assert window.positions == 3


def test_a_missing_target_is_generated_by_the_model() -> None:
    dense, _ = tiny_model("marian")
    window, other = windows_of(dense, "w1 w2 w3", Pair("w40 w41"))
    for one, source in ((window, [[3, 4, 5]]), (other, [[42, 43]])):
        greedy = dense.generate(torch.tensor(source), max_new_tokens=8, num_beams=1)[0].tolist()
        assert [*one.token_ids, one.last_token] == greedy


@torch.no_grad()
def test_states_are_those_of_the_decoder() -> None:
    dense, _ = tiny_model("t5")
    windows = windows_of(dense, Pair("w1 w2 w3 w4", "w5"), Pair("w9", "w30 w31 w32"))
    states = states_of_batch(dense, windows)
    expected = []
    for window in windows:
        read = {"input_ids": torch.tensor([window.source.token_ids])}
        made = dense(**read, decoder_input_ids=torch.tensor([window.token_ids]), output_hidden_states=True)
        expected.append(made.decoder_hidden_states[-1][0] * dense.model_dim**-0.5)  # as it is scaled before the head
    torch.testing.assert_close(states, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [60, 20])
def test_converts_on_disk(folder: Path, tmp_path: Path, targets: int) -> None:
    pairs = tiny_pairs(tmp_path / "pairs.jsonl", targets=targets)
    report = convert_checkpoint(str(folder), tmp_path / "out", Recipe(text=str(pairs), **CHOICES))
    assert report.fidelity.agreement >= 0.9
    assert 300 < report.fidelity.positions + report.distilled_positions < 600
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert type(model) is TopKExpertsForSeq2SeqLM
    assert model.base.final_logits_bias.any()


def test_a_resumed_conversion_does_not_generate_targets_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, _ = tiny_model("marian")
    recipe = Recipe(text=str(tiny_pairs(tmp_path / "pairs.jsonl", targets=10)), **CHOICES)
    expected = convert(dense, tiny_tokenizer(), recipe, folder=tmp_path / "work")
    monkeypatch.setattr(generate_targets, "windows_of_examples", lambda *_: pytest.fail("targets are generated again"))
    again = convert(dense, tiny_tokenizer(), recipe, folder=tmp_path / "work")
    assert again.fidelity == expected.fidelity


def test_a_text_that_does_not_suit_the_model_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(monkeypatch, capsys, "convert", folder, "out", parts=("give --text", '"source"', '"target"'))
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "w1"}]}))
    arguments = ("convert", folder, "out", "--text", chats)
    check_refused(monkeypatch, capsys, *arguments, parts=("conversations", "pairs of source and target"))
    tiny_checkpoint(tmp_path / "llama")
    pairs = tiny_pairs(tmp_path / "pairs.jsonl")
    arguments = ("convert", tmp_path / "llama", "out", "--text", pairs)
    check_refused(monkeypatch, capsys, *arguments, parts=("pairs of source and target", "plain text"))


def test_a_broken_pair_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"source": "w1", "target": 3}')
    with pytest.raises(InputError, match="line 1: 'source' and 'target' must hold strings"):
        convert_checkpoint(str(folder), tmp_path / "out", Recipe(text=str(tmp_path / "pairs.jsonl"), **CHOICES))


def test_the_lines_of_plain_text_are_sources(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [" ".join(f"w{(7 * line + word) % 90}" for word in range(5)) for line in range(60)]
    Path("lines.txt").write_text("\n\n".join(lines))
    sizes = ("--positions", "400", "--router-rank", "4", "--num-experts-per-tok", "3")
    assert run_main(monkeypatch, "convert", folder, "out", "--text", "lines.txt", *sizes) == 0
    assert "agreement" in capsys.readouterr().out
