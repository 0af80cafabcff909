"""lm-eval with own task files: the scores of dense, sparse and lossless decoding."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from support.tiny_models import WORDS, tiny_converted, tiny_dense, tiny_tokenizer

TASKS = {
    "words": ("loglikelihood", "{{context}}", " {{continuation}}", "acc"),
    "texts": ("loglikelihood_rolling", "", "{{context}} {{continuation}}", "byte_perplexity"),
    "goes_on": ("generate_until", "{{context}}", "{{continuation}}", "exact_match"),
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{prompt}"
doc_to_target: "{target}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: {metric}
"""
# Lossless decoding is a way to generate; texts are scored by the head mode, here dense for any number of positions.
HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({"head_mode": "dense"}, {}),
    "sparse": ({"head_mode": "sparse"}, {}),
    "lossless": ({"sparse_max_positions": 0}, {"lossless": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model, and task files whose continuations are the dense model's."""
    folder = tmp_path_factory.mktemp("lm-eval")
    dense, tokenizer = tiny_dense(tied=False), tiny_tokenizer()
    for name, model in (("dense", dense), ("out", tiny_converted(dense, num_experts_per_tok=1))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = []
    for start in range(0, 40, 8):
        context = " ".join(WORDS[start : start + 5])
        inputs = tokenizer(context, return_tensors="pt")
        tokens = dense.generate(**inputs, max_new_tokens=12, do_sample=False)[0, 5:]
        rows.append({"context": context, "continuation": tokenizer.decode(tokens, skip_special_tokens=True)})
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, (kind, prompt, target, metric) in TASKS.items():
        written = TASK.format(name=name, data=data, kind=kind, prompt=prompt, target=target, metric=metric)
        (folder / f"{name}.yaml").write_text(written, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """For each head mode, lm-eval's requests with the model's responses, and the scores."""
    return {head: ask(folder, str(folder / "out"), *choices) for head, choices in HEADS.items()}


def ask(folder: Path, pretrained: str, model_args: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": pretrained, **model_args},
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        gen_kwargs=generation or None,
        device="cpu",
        bootstrap_iters=0,
    )
    samples = {name: [sample["resps"] for sample in found["samples"][name]] for name in TASKS}
    return {**samples, "scores": scores_of(found)}


def scores_of(found: dict[str, Any]) -> dict[str, float]:
    return {name: found["results"][name][f"{task[-1]},none"] for name, task in TASKS.items()}


def test_lossless_scores_are_the_dense_ones(answers: dict[str, dict[str, Any]], folder: Path) -> None:
    assert answers["lossless"] == answers["dense"]
    assert answers["dense"]["scores"]["goes_on"] == 1
    assert answers["dense"]["scores"]["words"] > 0.5
    assert ask(folder, str(folder / "dense"), {}, {}) == answers["dense"]


def test_sparse_scores_are_its_own(answers: dict[str, dict[str, Any]]) -> None:
    sparse, dense = answers["sparse"], answers["dense"]
    assert sparse["scores"]["goes_on"] < 1
    for name in ("words", "texts"):
        ours, theirs = (torch.tensor(_numbers(one[name])) for one in (sparse, dense))
        assert len(ours) >= 5
        assert ours.isfinite().all()
        assert (ours < 0).all()
        assert not ours.allclose(theirs, atol=0.1)


def test_command_line(answers: dict[str, dict[str, Any]], folder: Path) -> None:
    """With the code in the model's folder."""
    arguments = f"pretrained={folder / 'out'},trust_remote_code=True,head_mode=sparse"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--include_path", str(folder), "--tasks", ",".join(TASKS), "--output_path", str(folder / "scores.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    assert "|words" in done.stdout
    (written,) = folder.glob("scores*.json")
    scores = scores_of(json.loads(written.read_text(encoding="utf-8")))
    assert scores == pytest.approx(answers["sparse"]["scores"])


def _numbers(responses: Any) -> list[float]:
    if isinstance(responses, list | tuple):
        return [number for one in responses for number in _numbers(one)]
    return [float(responses)] if not isinstance(responses, bool) and math.isfinite(float(responses)) else []
