"""`hf-topk bench` on tiny models; no test depends on measured times."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import run_main
from support.seq2seq_models import tiny_model
from support.tiny_models import TINY_SHAPE, tiny_checkpoint, tiny_converted, tiny_dense, tiny_text
from test_cli import run_script
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor

from hf_topk.bench import head_speed as bench_head
from hf_topk.bench.baselines import HnswHead, MissingPackageError, int8_head, random_flashhead
from hf_topk.bench.competitors import Competitors, sampled_text
from hf_topk.bench.decode_speed import Decoding
from hf_topk.bench.prompts import Prompts
from hf_topk.bench.random_experts import convert_at_random
from hf_topk.bench.shapes import SHAPES, random_model
from hf_topk.bench.suite import Choices, bench
from hf_topk.bench.timing import Spread
from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.inspection.speed import Speed
from hf_topk.model.errors import InputError

pytestmark = pytest.mark.slow

HEAD_KEYS = {f"{name}_ms" for name in ("dense", "int8", "flashhead", "hnsw", "sparse", "lossless")}
E2E_KEYS = {f"{name}_tok_s" for name in ("dense", "sparse", "lossless", "no_head")}


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torchao, hnswlib nor matplotlib is installed."""
    plain_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("torchao", "hnswlib", "matplotlib"):
            raise ModuleNotFoundError(name)
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SHAPES, "tiny", TINY_SHAPE)
    return "tiny"


def random_text(models: Competitors) -> tuple[Tensor, Prompts]:
    head = models.sparse.head
    return torch.randn(40, head.in_features).to(head.weight.dtype), models.prompts


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    own = tiny_converted(num_rescored=20)
    return bench(own, random_text, Choices(batches=(1, 3, 32), without=("int8", "hnsw"), rounds=2))


def test_the_report_reads_what_is_printed(metrics: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(metrics))
    rates = Speed.read(file, tiny_converted(num_rescored=20).head).by_name
    assert set(rates) == {"dense", "sparse", "lossless", "no head (ceiling)"}
    assert rates["sparse"].median == metrics["e2e"]["sparse_tok_s"]


# The competitors


def test_most_drafts_of_a_random_model_are_accepted(tiny_shape: str) -> None:
    decoding = Decoding(Competitors.of(convert_at_random(random_model(tiny_shape, torch.float32))), rounds=2)
    decoding.greedy()
    assert decoding.stats.tokens == 3 * 32
    assert decoding.stats.acceptance > 0.8
    assert decoding.stats.dense_passes_per_token < 0.3


# The baselines


@pytest.mark.parametrize("vocab_size", [160, 100])
def test_random_flashhead_has_every_token_once(vocab_size: int) -> None:
    head = random_flashhead(torch.randn(vocab_size, 8), None)
    assert head.cluster_ids.unique().tolist() == list(range(vocab_size))
    assert head.cluster_ids.shape == (-(-vocab_size // 16), 16)


def test_missing_packages_are_named(without_packages: None, tmp_path: Path) -> None:
    weight = torch.randn(30, 8)
    for make, package in ((int8_head, "torchao"), (HnswHead, "hnswlib")):
        with pytest.raises(MissingPackageError, match=rf"needs {package}: pip install 'hf-topk\[bench\]'"):
            make(weight, None)


def test_a_baseline_without_its_package_is_skipped(without_packages: None, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = bench(tiny_converted(), random_text, Choices(batches=(), rounds=1))
    assert metrics["head"]["int8_ms"] is metrics["head"]["hnsw_ms"] is None
    assert metrics["head"]["flashhead_ms"] > 0
    assert not any("int8" in name or "hnsw" in name for name in metrics["ratios"]["head"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "is skipped" in line]
    assert [line.split(":")[0] for line in lines] == ["int8 is skipped", "hnsw is skipped"]


# Clocks


def test_lossless_time_is_that_of_drafts_and_verification_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def fake(runs: dict[str, Any], states: Tensor, size: int, rounds: int, description: str) -> dict[str, Spread]:
        runs["verification"](states[:1])
        return {name: Spread(2.0, 1.0, 3.0) if name == "draft" else Spread(10.0, 8.0, 12.0) for name in runs}

    models = Competitors.of(tiny_converted())
    monkeypatch.setattr(bench_head, "head_seconds", fake)
    monkeypatch.setattr(bench_head, "greedy_logits_of", lambda _: lambda hidden: asked.append(tuple(hidden.shape)))
    heads = bench_head.Heads(models, random_text(models)[0], ("int8", "flashhead", "hnsw"))
    stats = bench_head.LosslessStats(tokens=100, forward_passes=110, dense_passes=20)
    lossless = heads.one_position(stats, 1, False)["lossless"]
    assert lossless.median == pytest.approx(1.1 * 2 + 0.2 * 10)
    assert asked == [(5, 32)]


@pytest.mark.parametrize(("num_rescored", "rows"), [(20, 8 + 20), (32, 8 + 2 * 16)])
def test_parts_are_those_of_the_sparse_head(num_rescored: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Competitors.of(tiny_converted(num_rescored=num_rescored))
    head, states, seen = models.sparse.head, random_text(models)[0], {}

    def fake(runs: dict[str, Any], *_: object) -> dict[str, Spread]:
        seen.update(runs)
        return dict.fromkeys(runs, Spread(1.0, 1.0, 1.0))

    monkeypatch.setattr(bench_head, "head_seconds", fake)
    heads = bench_head.Heads(models, states, ("int8", "flashhead", "hnsw"))
    heads.one_position(bench_head.LosslessStats(tokens=10, forward_passes=10, dense_passes=1), 1, False)
    scored = head.score(states[:2])
    ids = scored.ids
    assert ids.shape[1] == rows
    assert torch.equal(seen["part_gather"](states[:1]), head.weight[ids[0]])
    products = seen["part_gather_dot"](states[1:2])  # parts go through the states by turns
    torch.testing.assert_close(products[0], F.linear(states[1], head.weight)[ids[1]], atol=1e-4, rtol=1e-4)
    assert ("part_screen" in seen) == head.screens == (num_rescored == 20)
    if head.screens:
        screened = seen["part_screen"](states[:1])
        torch.testing.assert_close(screened, head.tail.screen(states[:1], scored.experts[:1]))


# Metrics


def test_every_key_is_there(metrics: dict[str, Any]) -> None:
    assert set(metrics["head"]) >= {*HEAD_KEYS, "sparse_all_logits_ms", "auto_ms", "part_screen_ms"}
    assert metrics["head"]["int8_ms"] is metrics["head"]["hnsw_ms"] is None
    assert set(metrics["e2e"]) == E2E_KEYS
    assert list(metrics["batches"]) == ["1", "3", "32"]
    for medians in metrics["batches"].values():
        assert set(medians) >= {"dense_ms", "auto_ms", "dense_tok_s", "auto_tok_s"}
    assert metrics["dtype"] == "float32"
    assert metrics["threads"] == torch.get_num_threads()
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["sizes"]["parameters"] == tiny_dense().num_parameters()
    assert metrics["sizes"]["num_rescored"] == 20
    assert metrics["added_memory_share"] == tiny_converted().head.added_bytes() / (100 * 32 * 4)
    assert set(metrics["prompt"]) == {"dense_ms", "auto_ms"}
    assert set(metrics["sampling"]) == E2E_KEYS - {"lossless_tok_s"}
    assert 0 <= metrics["tail_share"] <= 1
    assert 0 <= metrics["auto_sparse_up_to"] <= 64
    assert 0 < metrics["lossless"]["dense_passes_per_token"] <= 1
    json.dumps(metrics, allow_nan=False)


def test_dense_is_the_faster_of_two_dtypes(metrics: dict[str, Any]) -> None:
    for medians in (metrics["head"], *metrics["batches"].values()):
        for name in ("dense", "dense_sampling"):
            assert medians[f"{name}_ms"] == min(medians[f"{name}_bfloat16_ms"], medians[f"{name}_float32_ms"])


def test_ratios_are_those_of_the_medians(metrics: dict[str, Any]) -> None:
    units = {"head": "ms", "prompt": "ms", "e2e": "tok_s", "sampling": "tok_s"}
    sections = [(metrics["ratios"][name], metrics[name], unit) for name, unit in units.items()]
    for size, ratios in metrics["ratios"]["batches"].items():
        sections += [(ratios[part], metrics["batches"][size], units[part]) for part in ("head", "e2e")]
    counted = 0
    for ratios, medians, unit in sections:
        for name, ratio in ratios.items():
            one, other = (
                name.replace("_share_of_ceiling", "_over_ceiling").replace("ceiling", "no_head").split("_over_")
            )
            quotient = medians[f"{one}_{unit}"] / medians[f"{other}_{unit}"]
            assert ratio == pytest.approx(1 / quotient if unit == "ms" else quotient)
            counted += 1
    assert counted > 20
    for other in ("dense", "flashhead"):
        assert f"sparse_over_{other}" in metrics["ratios"]["head"]
    assert [name for name in metrics["ratios"]["head"] if "sampling" in name] == ["sampling_over_dense_sampling"]
    for share in ("sparse", "lossless"):
        assert f"{share}_share_of_ceiling" in metrics["ratios"]["e2e"]


def test_medians_lie_within_their_quartiles(metrics: dict[str, Any]) -> None:
    for section in ("head", "prompt", "e2e", "sampling"):
        for name, (low, high) in metrics["spread"][section].items():
            assert low <= metrics[section][name] <= high


@pytest.mark.parametrize("does_sample", [False, True])
def test_compiled_decoding_is_measured(does_sample: bool) -> None:
    torch.compiler.reset()
    models = Competitors.of(tiny_converted(tiny_dense(num_hidden_layers=1), num_rescored=20))
    spreads = Decoding(models, rounds=1).compiled(does_sample, backend="eager")
    assert set(spreads) == {"dense", "sparse", "no_head"} | ({"lossless"} if not does_sample else set())
    assert models.dense._compiled_call is not None
    assert models.no_head._compiled_call is not None
    assert models.sparse._compiled_decoder is not None


@pytest.mark.parametrize("model_type", ["marian", "whisper"])
def test_an_encoder_reads_once(model_type: str) -> None:
    dense, _ = tiny_model(model_type)
    own, encoded = tiny_converted(dense, num_rescored=20), []
    own.get_encoder().register_forward_hook(lambda *_: encoded.append(1))
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1) if model_type == "whisper" else None
    metrics = bench(own, random_text, Choices(batches=(2,), without=("int8", "hnsw"), rounds=1), extractor=extractor)
    assert set(metrics["e2e"]) == E2E_KEYS
    assert metrics["ratios"]["e2e"]["sparse_share_of_ceiling"] > 0
    assert metrics["lossless"]["forward_passes_per_token"] >= 1
    assert encoded == [1]
    models = Competitors.of(own, extractor)
    states, prompts = sampled_text(models, positions=30, batch=8)
    assert prompts is models.prompts
    assert len(states.unique(dim=0)) > 8


# The command


def test_measures_a_converted_model(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    text = tiny_text(tmp_path / "text.jsonl")
    recipe = Recipe(
        text=str(text), positions=600, window_length=32, expert_size=16, distill_steps=5, router_rank=4, tail_rank=4
    )
    convert_checkpoint(str(tmp_path / "model"), tmp_path / "out", recipe)
    options = ("--rounds", 1, "--batches", "2", "--without", "int8", "--without", "hnsw", "--threads", 1)
    done = run_script(tmp_path, "bench", "out", *options, "--json", "--plot", "plot.svg")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert (metrics["shape"], metrics["threads"], list(metrics["batches"])) == ("out", 1, ["2"])
    assert set(metrics["head"]) > HEAD_KEYS
    assert set(metrics["e2e"]) == E2E_KEYS
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert "Sampling text" in done.stderr


def test_prints_tables_of_a_shape(
    tiny_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--rounds", 1, "--batches", "1", "--without", "int8", "--without", "hnsw", "--plot", "plot.png")
    assert run_main(monkeypatch, "bench", "--shape", tiny_shape, *options) == 0
    text = capsys.readouterr().out
    assert text.startswith("tiny\nmachine: ")
    for line in (
        "FlashHead: ",
        "sparse: ",
        "lossless: ",
        "no head (ceiling): ",
        "batch 1: head ",
    ):
        assert f"\n{line}" in text
    assert ": 64 always-on tokens, 512 in 137 of 1,246 experts of 16\n" in text
    assert "; 576 rows scored (2.9%)" in text
    assert "HNSW:" not in text
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("give either", "--shape")),
        (("out", "--shape", "smollm2-135m"), ("give either", "--shape")),
        (("--shape", "gpt-5"), ("unknown shape 'gpt-5'", "smollm2-135m")),
        (("./gone",), ("no such model",)),
        (("--shape", "smollm2-135m", "--without", "int4"), ("unknown baseline 'int4'", "int8, flashhead, hnsw")),
        (("--shape", "smollm2-135m", "--batches", "1,x"), ("'1,x' is not a list of batch sizes", "1,2,4")),
        (("--shape", "smollm2-135m", "--batches", "0,64"), ("batch size 0", "from 1 to 64")),
        (("--shape", "smollm2-135m", "--dtype", "int4"), ("unknown dtype 'int4'", "bfloat16")),
        (("--shape", "smollm2-135m", "--body", "int2"), ("unknown decoder format 'int2'", "int8, int4")),
        (("--shape", "smollm2-135m", "--device", "gpu"), ("no device 'gpu'", "choose auto, cpu")),
        (("--shape", "smollm2-135m", "--plot", "plot.pdf"), ("cannot plot to plot.pdf", ".png or .svg")),
        (("--shape", "smollm2-135m", "--plot", "gone/plot.png"), ("there is no folder gone",)),
    ],
)
def test_refuses_in_one_line(
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "bench", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert all(part in printed.err for part in parts), printed.err


def test_int8_is_the_better_of_eager_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    def dense_in_its_place(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        built.append(weight)
        return lambda hidden: F.linear(hidden, weight, bias)

    monkeypatch.setattr(bench_head, "int8_head", dense_in_its_place)
    monkeypatch.setattr(bench_head, "compiled", lambda run, example: run)
    for is_there in (True, False):
        monkeypatch.setattr(bench_head, "has_compiler", lambda is_there=is_there: is_there)
        models = Competitors.of(tiny_converted())
        spreads = bench_head.Heads(models, random_text(models)[0], ("flashhead", "hnsw")).batch(2, rounds=3)
        ways = ["int8_eager", "int8_compiled"][: 1 + is_there]
        assert [name for name in spreads if name.startswith("int8_")] == ways
        assert spreads["int8"].median == min(spreads[way].median for way in ways)
    assert [weight.shape for weight in built] == [(100, 32)] * 2


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"--compile needs a C\+\+ compiler: install g\+\+"):
        Choices(compile=True)


def test_a_plot_needs_matplotlib(
    without_packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "bench", "--shape", "smollm2-135m", "--plot", "plot.png") == 2
    assert "--plot needs matplotlib: pip install 'hf-topk[bench]'" in capsys.readouterr().err
