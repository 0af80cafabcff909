"""A dense model spread by a device map converts to the same result as one in RAM."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.command_line import check_refused, contents
from support.tiny_models import QUICK, tiny_checkpoint, tiny_dense, tiny_text

from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.convert import load_dense as dense
from hf_topk.convert.source import open_source
from hf_topk.model.errors import InputError

REST = dict.fromkeys(("model.layers.0", "model.norm", "model.rotary_emb"), "cpu") | {"model.layers.1": "disk"}
LLAMA_MAPS: dict[str, Any] = {
    "a layer": {"model.embed_tokens": "cpu", "lm_head": "cpu", **REST},
    "the ends": {"model.embed_tokens": "disk", "lm_head": "disk", **REST},
    "everything": {"": "disk"},
}
GPT2_MAPS: dict[str, Any] = {"the model": {"transformer": "disk", "lm_head": "disk"}}
CASES = [
    *(("llama", tied, one) for tied in (True, False) for one in LLAMA_MAPS.values()),
    *(("gpt2", True, one) for one in GPT2_MAPS.values()),
]


@pytest.mark.parametrize("text", ["text.jsonl", pytest.param("mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model_type", "tied", "device_map"), CASES)
def test_offloaded_parts_change_nothing(
    model_type: str, tied: bool, device_map: Any, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "model", tiny_dense(model_type, tied=tied), chats=True)
    tiny_text(tmp_path / "text.jsonl")
    recipe = Recipe.from_dict({**QUICK, "text": text})
    convert_checkpoint("model", "plain", recipe)
    report = convert_checkpoint("model", "out", recipe, device_map=device_map)
    assert any(parameter.is_meta for parameter in report.model.parameters())
    assert result(tmp_path / "out") == result(tmp_path / "plain")


def result(folder: Path) -> dict[str, bytes | None]:
    """The written files, without the wall time."""
    files = contents(folder)
    metrics = json.loads(files.pop("figures.json"))
    assert metrics.pop("seconds") >= 0
    return {**files, "metrics": json.dumps(metrics).encode()}


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_stay_in_memory(tied: bool, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, tiny_dense(tied=tied))
    loaded = dense.load_dense(open_source(str(tmp_path), tmp_path), LLAMA_MAPS["the ends"])
    head, embeddings = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert not head.weight.is_meta
    assert not embeddings.weight.is_meta
    assert (head.weight is embeddings.weight) == tied


def test_refuses_a_device_map_that_separates_tied_tensors(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, tiny_dense())
    source = open_source(str(tmp_path), tmp_path)
    with pytest.raises(InputError, match=r"puts 'lm_head\.weight' and the weight it is tied to on different devices"):
        dense.load_dense(source, {**LLAMA_MAPS["the ends"], "model.embed_tokens": "cpu"})


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    tiny_checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return partial(check_refused, monkeypatch, capsys, "convert", "model", "out", "--device-map")


@pytest.mark.parametrize("device_map", ["everywhere", "cuda:99", "meta", "disk"])
def test_refuses_an_unknown_device(device_map: str, refused: Any) -> None:
    refused(device_map, parts=(f"device map '{device_map}'", "auto"))


def test_needs_accelerate(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    refused("auto", parts=("pip install 'hf-topk[accelerate]'",))
