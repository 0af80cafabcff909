"""The command line: a few runs in another process, the rest in this one."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.command_line import PROGRESS_LINE, check_refused, contents, own_lines, run_main
from support.tiny_models import QUICK, tiny_checkpoint, tiny_dense, tiny_text

from hf_topk.convert import Recipe, convert_checkpoint

SCRIPT = Path(sys.executable).with_name("hf-topk")
COMMANDS = ("convert", "evaluate", "inspect", "generate", "push", "bench", "demo")
EVALUATE_KEYS = [
    "agreement",
    "agreement_lower_bound",
    "top5_containment",
    "kl",
    "perplexity_dense",
    "perplexity_sparse",
    "log_z_error",
    "log_z_absolute_error",
    "calibration_error_dense",
    "calibration_error_sparse",
    "tail_rank_correlation",
    "bytes_read",
    "positions",
]
NUM_EXPERTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a text, and converted models: `out`, and `all` with k = M."""
    folder = tmp_path_factory.mktemp("folder")
    tiny_checkpoint(folder / "model", tiny_dense(tied=False))
    text = tiny_text(folder / "text.jsonl")
    for name, k in (("out", 1), ("all", NUM_EXPERTS)):
        recipe = Recipe.from_dict({**QUICK, "text": str(text), "num_experts_per_tok": k})
        convert_checkpoint(str(folder / "model"), folder / name, recipe)
    (folder / "recipe.yaml").write_text(Recipe.from_dict(QUICK).to_yaml())
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, as the current folder."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def printed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Runs a command in this process, and returns its standard output and standard error."""

    def run(*arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        assert run_main(monkeypatch, *arguments) == 0
        return tuple(capsys.readouterr())

    return run


@pytest.fixture
def refused(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return partial(check_refused, monkeypatch, capsys)


def run_script(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "no-cache"), "OMP_NUM_THREADS": "1"}
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


# In a process of its own


@pytest.mark.slow
def test_converts_and_evaluates(here: Path) -> None:
    done = run_script(
        here, "convert", "model", "new", "--text", "text.jsonl", "--recipe", "recipe.yaml", "--json", "--html-report"
    )
    assert done.returncode == 0, done.stderr
    assert "held-out documents of text.jsonl" in (here / "new" / "report.html").read_text(encoding="utf-8")
    report = json.loads(done.stdout)
    assert report["out"] == "new"
    assert {*EVALUATE_KEYS, "num_experts", "num_experts_per_tok", "added_bytes", "added_bytes_share"} < set(report)
    assert report["recipe"] == Recipe.from_yaml(here / "new" / "recipe.yaml").to_dict()
    assert all(PROGRESS_LINE.fullmatch(line) for line in own_lines(done.stderr)), done.stderr
    assert "Running the dense model" in done.stderr

    done = run_script(here, "evaluate", "new", "--text", "text.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert list(metrics) == EVALUATE_KEYS
    assert metrics["positions"] == 800
    assert 0 < metrics["agreement"] <= 1
    assert all(PROGRESS_LINE.fullmatch(line) for line in own_lines(done.stderr)), done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(
            ("convert", "nobody/no-such-model", "new"),
            ("no such model", "nobody/no-such-model", "the network"),
            marks=pytest.mark.slow,
        ),
        (("convert", "model", "new", "--combine", "exakt"), ("unknown combine 'exakt'", "did you mean 'exact'?")),
        pytest.param(
            ("evaluate", "model", "--text", "text.jsonl"),
            ("model is a dense model", "hf-topk convert"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_refuses_in_one_line(arguments: tuple[str, ...], parts: tuple[str, ...], here: Path) -> None:
    before = contents(here)
    done = run_script(here, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = own_lines(done.stderr)
    assert line.startswith("hf-topk: ")
    for part in parts:
        assert part in line
    assert {name: value for name, value in contents(here).items() if "no-cache" not in name} == before


# Help


def test_help_names_the_commands(printed: Callable[..., tuple[str, str]]) -> None:
    text, _ = printed("--help")
    for command in COMMANDS:
        assert command in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, printed: Callable[..., tuple[str, str]]) -> None:
    text, error = printed(command, "--help")
    assert f"Usage: hf-topk {command}" in text
    assert error == ""


def test_help_names_every_option(printed: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text, _ = printed("convert", "--help")
    for option in ("--text", "--expert-size", "--router-rank", "--tail-rank", "--combine", "--recipe"):
        assert option in text
    for option in ("--push-to-hub", "--private", "--revision", "--create-pr", "--resume", "--overwrite", "--json"):
        assert option in text


@pytest.mark.parametrize("arguments", [("push", "out", "me/x"), ("convert", "model", "new", "--push-to-hub", "me/x")])
def test_does_not_push_offline(arguments: tuple[str, ...], refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(*arguments, parts=("cannot push to me/x offline", "HF_HUB_OFFLINE", "hf-topk push DIR REPO"))


@pytest.mark.parametrize("arguments", [("zorglub",), ("convert",), ("evaluate", "out"), ("generate", "out", "--x")])
def test_wrong_usage_is_code_2(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(monkeypatch, *arguments) == 2


# What the commands print


def test_convert_prints_a_summary(printed: Callable[..., tuple[str, str]], here: Path) -> None:
    text, _ = printed("convert", "model", "new", "--text", "text.jsonl", "--recipe", "recipe.yaml")
    assert text.startswith("Wrote new\n")
    for name in ("experts", "top-1 agreement", "perplexity", "bytes read", "added on disk"):
        assert f"\n{name}: " in text
    assert "held-out positions of the calibration text (text.jsonl)" in text
    assert (here / "new" / "config.json").is_file()


def test_options_win_over_the_recipe_file(printed: Callable[..., tuple[str, str]]) -> None:
    options = ("--text", "text.jsonl", "--recipe", "recipe.yaml", "--expert-size", 8, "--router-rank", 7, "--json")
    recipe = json.loads(printed("convert", "model", "new", *options)[0])["recipe"]
    assert (recipe["expert_size"], recipe["router_rank"], recipe["tail_rank"]) == (8, 7, QUICK["tail_rank"])


def test_evaluate_prints_what_json_holds(printed: Callable[..., tuple[str, str]]) -> None:
    metrics = json.loads(printed("evaluate", "out", "--text", "text.jsonl", "--json")[0])
    text, _ = printed("evaluate", "out", "--text", "text.jsonl")
    assert f"agreement: {metrics['agreement']:.2%}" in text
    assert f"perplexity: {metrics['perplexity_dense']:.2f} dense, {metrics['perplexity_sparse']:.2f} sparse" in text
    assert "on 800 positions" in text


def test_evaluate_at_other_numbers_of_experts(printed: Callable[..., tuple[str, str]]) -> None:
    some, all_of_them = (
        json.loads(printed("evaluate", "out", "--text", "text.jsonl", "--json", "-k", k)[0]) for k in (1, NUM_EXPERTS)
    )
    assert some["agreement"] < all_of_them["agreement"] == 1
    assert some["bytes_read"] < all_of_them["bytes_read"]
    assert all_of_them["kl"] == pytest.approx(0, abs=1e-4)


def test_evaluate_a_sample_of_the_text(printed: Callable[..., tuple[str, str]]) -> None:
    metrics = json.loads(printed("evaluate", "out", "--text", "text.jsonl", "--positions", 100, "--json")[0])
    assert metrics["positions"] == 100


def test_evaluate_compares_lossless_decoding(printed: Callable[..., tuple[str, str]]) -> None:
    options = ("evaluate", "out", "--text", "text.jsonl", "--lossless", "--prompts", 3, "--batch-size", 2)
    metrics = json.loads(printed(*options, "--dtype", "float32", "--json")[0])
    assert metrics["lossless_tokens"] == metrics["lossless_identical"] == 3 * 64
    assert metrics["lossless_ties"] == metrics["lossless_differing"] == 0
    assert 0 < metrics["dense_passes_per_token"] <= 1 <= metrics["forward_passes_per_token"]
    assert 0 <= metrics["acceptance"] <= 1
    text, _ = printed(*options)
    assert "lossless: 192 of 192 tokens identical to the dense model's, 0 ties, 0 others" in text
    assert "per token: " in text


def test_json_has_null_for_floats_that_are_not_finite(printed: Callable[..., tuple[str, str]]) -> None:
    text, _ = printed("evaluate", "all", "--text", "text.jsonl", "--json")
    metrics = json.loads(text, parse_constant=pytest.fail)
    assert metrics["tail_rank_correlation"] is None  # of no tokens, since all are scored
    assert metrics["perplexity_dense"] > 1


def test_inspect_shows_experts_recipe_and_metrics(printed: Callable[..., tuple[str, str]], here: Path) -> None:
    text, _ = printed("inspect", "out", "--experts", 4)
    lines = text.splitlines()
    assert "6 of 16 tokens, 1 picked per position" in text
    for name, value in Recipe.from_yaml(here / "out" / "recipe.yaml").to_dict().items():
        if name != "text" and value is not None:
            assert f"{name}: {value}" in lines
    agreement = json.loads((here / "out" / "figures.json").read_text())["agreement"]
    assert f"top-1 agreement: {agreement:.2%}" in text
    _, columns, *experts = lines[lines.index("Experts, 4 of 6, the most used first") :]
    assert columns.split("\t")[:2] == ["expert", "picked at"]
    assert len(list(filter(None, experts))) == 1 + 4
    assert "'<|endoftext|>'" in experts[0]
    assert all("'w" in line for line in experts[1:5])


def test_inspect_measures_on_another_text(printed: Callable[..., tuple[str, str]]) -> None:
    text, said = printed("inspect", "out", "--text", "text.jsonl", "--positions", 90)
    assert "measured on: 90 positions of text.jsonl" in text
    assert "Comparing the heads" in said


def test_inspect_writes_a_page(printed: Callable[..., tuple[str, str]], here: Path) -> None:
    text, _ = printed("inspect", "out", "--html", "page.html")
    assert text == "Wrote page.html\n"
    page = (here / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "held-out documents of text.jsonl" in page


def test_inspect_refuses_what_it_cannot_do(refused: Any) -> None:
    refused("inspect", "out", "--html", "gone/page.html", parts=("gone/page.html cannot be written", "no folder gone"))
    refused("inspect", "out", "--positions", 100, parts=("--positions needs --text FILE",))
    refused("inspect", "out", "--text", "gone.txt", parts=("gone.txt",))
    refused("inspect", "out", "--bench", "gone.json", parts=("cannot read gone.json",))
    refused("inspect", "out", "--bench", "text.jsonl", parts=("is not what `hf-topk bench DIR --json` prints",))


def test_generate_continues_the_prompt(printed: Callable[..., tuple[str, str]]) -> None:
    text, _ = printed("generate", "out", "w5 w17 w40", "--max-new-tokens", 5)
    assert text.startswith("w5 w17 w40 ")
    assert len(text.split()) == 8


def test_with_all_experts_the_output_is_the_dense_model_s(printed: Callable[..., tuple[str, str]]) -> None:
    texts = {
        printed("generate", "all", "w5 w17 w40", "--max-new-tokens", 20, "--head-mode", mode)[0]
        for mode in ("dense", "sparse", "auto")
    }
    assert len(texts) == 1


def test_generate_lossless_prints_the_dense_model_s_text(printed: Callable[..., tuple[str, str]]) -> None:
    dense, nothing = printed("generate", "out", "w3 w14 w15", "--head-mode", "dense")
    ours, said = printed("generate", "out", "w3 w14 w15", "--lossless")
    assert ours == dense
    assert "dense passes" not in nothing
    assert re.search(
        r"^\d+ tokens, \d\.\d\d verification passes per token, \d+% of \d+ draft tokens accepted$", said, re.MULTILINE
    )


def test_generate_samples_with_a_seed(printed: Callable[..., tuple[str, str]]) -> None:
    texts = [printed("generate", "out", "w5", "--temperature", 1.5, "--seed", seed)[0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


# Converted models that are none, or not whole


def lose_a_tensor(out: Path) -> None:
    shard = max(out.glob("*.safetensors"))
    tensors = load_file(shard)
    del tensors[min(name for name in tensors if "router" in name)]
    save_file(tensors, shard, metadata={"format": "pt"})


def edit_config(out: Path, **choices: object) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **choices}))


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "gone": (lambda out: shutil.rmtree(out), ("no such model: there is no folder ./out",)),
    "dense": (lambda out: shutil.copytree("model", out, dirs_exist_ok=True), ("out is a dense model", "convert it")),
    "a file": (lambda out: [shutil.rmtree(out), out.write_text("")], ("out is a file", "give its folder")),
    "no config": (lambda out: (out / "config.json").unlink(), ("is not a model", "no config.json")),
    "config cut": (lambda out: (out / "config.json").write_text('{"a'), ("cannot be read", "convert or fetch it")),
    "k above M": (lambda out: edit_config(out, num_experts_per_tok=7), ("cannot be read", "num_experts_per_tok")),
    "M no number": (lambda out: edit_config(out, num_experts="six"), ("cannot be read", "num_experts")),
    "other sizes": (lambda out: edit_config(out, router_rank=50), ("does not load", "convert or fetch it again")),
    "random weights": (lambda out: max(out.glob("*.safetensors")).write_bytes(os.urandom(999)), ("does not load",)),
    "weights cut": (lambda out: truncate(min(out.glob("*.safetensors"))), ("does not load", "convert or fetch")),
    "lost shard": (lambda out: max(out.glob("*.safetensors")).unlink(), ("does not load", "convert or fetch")),
    "lost tensor": (lose_a_tensor, ("is not complete", "router", "convert or fetch it again")),
    "no tokenizer": (lambda out: [file.unlink() for file in out.glob("tokenizer*")], ("does not load",)),
}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("damage", DAMAGE)
def test_refuses_an_incomplete_converted_model(damage: str, here: Path, refused: Any) -> None:
    harm, parts = DAMAGE[damage]
    harm(here / "out")
    refused("evaluate", "./out", "--text", "text.jsonl", parts=parts)
    refused("inspect", "./out", parts=parts)
    refused("generate", "./out", "w1", parts=parts)


def test_refuses_wrong_choices(refused: Any) -> None:
    for k in (0, 7, -1):
        parts = (f"num_experts_per_tok is {k}", "from 1 to the 6 experts")
        refused("evaluate", "out", "--text", "text.jsonl", "-k", k, parts=parts)
    refused("evaluate", "out", "--text", "gone.txt", parts=("gone.txt",))
    refused("evaluate", "out", "--text", "text.jsonl", "--dtype", "int4", parts=("dtype 'int4'", "bfloat16"))
    refused("evaluate", "out", "--text", "text.jsonl", "--positions", 1, parts=("positions is 1", "2 or more"))
    refused("generate", "out", "w1", "--head-mode", "spars", parts=("unknown head mode 'spars'", "auto, sparse, dense"))
    refused("generate", "out", "", parts=("the prompt is empty",))
    for command in (("evaluate", "out", "--text", "text.jsonl"), ("generate", "out", "w1"), ("bench", "out")):
        refused(*command, "--device", "gpu", parts=("no device 'gpu'", "choose auto, cpu"))


def test_inspect_accepts_missing_metrics_and_refuses_damaged_ones(
    refused: Any, here: Path, printed: Callable[..., tuple[str, str]]
) -> None:
    for damaged in ('{"agree', "[1]"):
        (here / "out" / "figures.json").write_text(damaged)
        refused("inspect", "out", parts=("figures.json of out is damaged", "remove it"))
    (here / "out" / "figures.json").unlink()
    assert "Experts" in printed("inspect", "out")[0]
