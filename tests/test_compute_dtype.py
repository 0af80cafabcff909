"""The dtype to compute in; the stored dtype stays the dense model's."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import QUICK, tiny_checkpoint, tiny_dense, tiny_text

from hf_topk import compute_dtype
from hf_topk.compute_dtype import DECODING, READING, faster_dtype
from hf_topk.convert import Recipe, convert_checkpoint
from hf_topk.convert import load_dense as dense
from hf_topk.convert.source import open_source
from hf_topk.loading import load_converted

CPU = torch.device("cpu")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """Sets the measured time of products in each dtype."""
    taken = {torch.float32: 1.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(
        compute_dtype, "_least_seconds", lambda dtypes, device, positions: [taken[dtype] for dtype in dtypes]
    )
    faster_dtype.cache_clear()
    yield taken
    faster_dtype.cache_clear()


@pytest.mark.parametrize(("seconds", "faster"), [(0.5, torch.bfloat16), (1.1, torch.bfloat16), (3.0, torch.float32)])
def test_float32_is_chosen_where_it_is_clearly_faster(
    seconds: float, faster: torch.dtype, times: dict[torch.dtype, float]
) -> None:
    times[torch.bfloat16] = seconds
    assert faster_dtype(torch.bfloat16, CPU) == faster
    times[torch.bfloat16] = 1 / seconds
    assert faster_dtype(torch.bfloat16, CPU) == faster  # it is measured once
    assert faster_dtype(torch.float32, CPU) == torch.float32
    assert faster_dtype(torch.float64, CPU) == torch.float64


@pytest.mark.parametrize("positions", [READING, DECODING])
def test_measures_for_real(positions: int) -> None:
    faster_dtype.cache_clear()
    assert faster_dtype(torch.bfloat16, CPU, positions) in (torch.bfloat16, torch.float32)


@pytest.mark.usefixtures("times")  # keeps what is measured here from other tests
def test_decoding_can_be_faster_in_another_dtype_than_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that emulates bfloat16, where only many positions are bound by arithmetic."""
    emulated = {(torch.bfloat16, READING): 3.0, (torch.bfloat16, DECODING): 0.6}

    def seconds(dtypes: Sequence[torch.dtype], device: torch.device, positions: int) -> list[float]:
        return [emulated.get((dtype, positions), 1.0) for dtype in dtypes]

    monkeypatch.setattr(compute_dtype, "_least_seconds", seconds)
    assert faster_dtype(torch.bfloat16, CPU, READING) == torch.float32
    assert faster_dtype(torch.bfloat16, CPU, DECODING) == torch.bfloat16


def test_the_stored_dtype_is_kept_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: dict[torch.dtype, float]
) -> None:
    times[torch.bfloat16] = 3.0
    source = open_source(str(tmp_path), tiny_checkpoint(tmp_path, tiny_dense().to(torch.bfloat16)))
    assert dense.stored_type(source) == source.first_float_type() == torch.bfloat16
    assert dense.dtype_to_compute_in(source, None) == torch.float32
    assert dense.dtype_to_compute_in(source, "cpu") == torch.bfloat16
    monkeypatch.setattr(dense, "_ram", lambda: source.nbytes())
    assert dense.dtype_to_compute_in(source, None) == torch.bfloat16


@pytest.mark.parametrize("combine", ["exact", "learned"])
def test_computes_in_float32_and_stores_bfloat16(combine: str, tmp_path: Path, times: dict[torch.dtype, float]) -> None:
    folder = tiny_checkpoint(tmp_path / "dense", tiny_dense(tied=False).to(torch.bfloat16))
    text = tiny_text(tmp_path / "text.jsonl")
    choices = {"combine": combine, "num_experts_per_tok": 3, "num_rescored": 20}
    recipe = Recipe.from_dict({**QUICK, "text": str(text), **choices})
    of_own = convert_checkpoint(str(folder), tmp_path / "own", recipe)
    faster_dtype.cache_clear()
    times[torch.bfloat16] = 3.0
    report = convert_checkpoint(str(folder), tmp_path / "out", recipe)
    assert (of_own.model.dtype, report.model.dtype) == (torch.bfloat16, torch.float32)
    for name in ("bytes_read", "num_experts"):
        assert report.metrics()[name] == of_own.metrics()[name]
    assert report.added_bytes == of_own.added_bytes
    stored = load_file(max((tmp_path / "out").glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.bfloat16}
    for fastest_for, dtype in ((READING, torch.float32), (None, torch.bfloat16)):
        model, _ = load_converted(str(tmp_path / "out"), fastest_for=fastest_for)
        assert (model.dtype, model.config.dtype) == (dtype, dtype)
        # What is stored is what is counted, whatever is computed in.
        loaded, made = model.head, report.model.head
        assert loaded.bytes_read() / loaded.dense_bytes() == made.bytes_read() / made.dense_bytes()
        assert model.head.added_bytes() == report.added_bytes
