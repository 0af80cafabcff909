"""Formats the results of `hf-topk bench` as tables."""

from collections.abc import Iterator
from typing import Any

from ..model.errors import InputError

Rows = dict[str, str]

NAMES = {
    "dense": "dense",
    "dense_sampling": "dense, with sampling",
    "dense_compiled": "dense, compiled",
    "dense_graph": "dense, CUDA graph",
    "int8": "int8 (torchao)",
    "flashhead": "FlashHead",
    "flashhead_graph": "FlashHead, CUDA graph",
    "hnsw": "HNSW",
    "sparse": "sparse",
    "sampling": "sparse, with sampling",
    "sparse_all_logits": "sparse, all logits",
    "sparse_graph": "sparse, CUDA graph",
    "sparse_compiled": "sparse, all logits, compiled",
    "auto": "auto",
    "part_router": "sparse: router",
    "part_screen": "sparse: screen",
    "part_gather": "sparse: copy of the scored rows",
    "part_gather_dot": "sparse: copy and products of the scored rows",
    "lossless": "lossless",
    "no_head": "no head (ceiling)",
}


def batch_sizes(text: str) -> tuple[int, ...]:
    """Parse batch sizes, such as "1,2,4".

    Raises:
        InputError: when it is not a list of numbers.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"'{text}' is not a list of batch sizes: write numbers separated by commas, such as 1,2,4")
    return tuple(int(part) for part in parts)


def tables(metrics: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """Yield the title and the rows of each table.

    Args:
        metrics: of [`run_bench`].
    """
    yield metrics["shape"], _circumstances(metrics)
    yield "Head, ms per token (quartiles)", _times(metrics, "head")
    yield "Decoding, tokens/s (quartiles)", _rates(metrics, "e2e")
    if metrics["e2e_compiled"]:
        yield "Decoding, compiled, tokens/s (quartiles)", _rates(metrics, "e2e_compiled")
    yield "Sampling with temperature and top-p, tokens/s (quartiles)", _rates(metrics, "sampling")
    if metrics["sampling_compiled"]:
        yield "Sampling, compiled, tokens/s (quartiles)", _rates(metrics, "sampling_compiled")
    yield "Head in a prefill, ms (quartiles)", _times(metrics, "prompt")
    yield "Batches: head and decoding", dict(_batches(metrics))


def _circumstances(metrics: dict[str, Any]) -> Rows:
    sizes, lossless, overhead = metrics["sizes"], metrics["lossless"], metrics["step_overhead_ms"]
    scored = sizes["num_always_on"] + sizes["num_rescored"]
    return {
        "machine": f"{metrics['machine']}; {metrics['threads']} threads, {metrics['dtype']}"
        + (f", decoder in {metrics['body']}" if metrics["body"] else ""),
        "versions": ", ".join(f"{name} {number}" for name, number in metrics["versions"].items()),
        "head": f"{sizes['vocab_size']:,} x {sizes['hidden_size']:,}; {scored:,} rows scored "
        f"({scored / sizes['vocab_size']:.1%}): {sizes['num_always_on']:,} always-on tokens, "
        f"{sizes['num_rescored']:,} in {sizes['num_experts_per_tok']:,} of {sizes['num_experts']:,} experts of "
        f"{sizes['expert_size']:,}",
        "tail": f"computed in greedy decoding at {metrics['tail_share']:.1%} of the positions, where it could win",
        "auto": f"sparse up to {metrics['auto_sparse_up_to']:,} positions",
        "added memory": f"{metrics['added_memory_share']:.1%} of the head",
        "lossless": f"{lossless['dense_passes_per_token']:.3f} verification passes and "
        f"{lossless['forward_passes_per_token']:.3f} forward passes of the decoder per token, "
        f"{lossless['acceptance']:.1%} of the draft tokens accepted",
        "Python overhead per step": f"{overhead['wrapper']:.3f} ms wrapper, {overhead['sparse']:.3f} ms with the head",
    }


def _times(metrics: dict[str, Any], section: str) -> Rows:
    return dict(_rows(metrics, section, "ms"))


def _rates(metrics: dict[str, Any], section: str) -> Rows:
    return dict(_rows(metrics, section, "tok_s"))


def _rows(metrics: dict[str, Any], section: str, unit: str) -> Iterator[tuple[str, str]]:
    medians, ratios, spread = metrics[section], metrics["ratios"][section], metrics["spread"][section]
    for name, label in NAMES.items():
        key = f"{name}_{unit}"
        if medians.get(key) is None:
            continue
        low, high = spread[key]
        text = f"{medians[key]:.2f} ({low:.2f} to {high:.2f})"
        shown = [
            f"{value:.2f} x {other.removeprefix(f'{name}_over_').replace('_', ' ')}"
            for other, value in ratios.items()
            if other.startswith(f"{name}_over_")
        ]
        if (share := ratios.get(f"{name}_share_of_ceiling")) is not None:
            shown.append(f"{share:.1%} of the ceiling")
        yield label, ": ".join([text, ", ".join(shown)]) if shown else text


def _batches(metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for size, medians in metrics["batches"].items():
        head, e2e = (metrics["ratios"]["batches"][size][part] for part in ("head", "e2e"))
        yield (
            f"batch {size}",
            f"head {medians['dense_ms']:.2f} ms dense, {medians['auto_ms']:.2f} auto: {head['auto_over_dense']:.2f} x; "
            f"decoding {medians['dense_tok_s']:.1f} tokens/s dense, {medians['auto_tok_s']:.1f} auto: "
            f"{e2e['auto_over_dense']:.2f} x",
        )
