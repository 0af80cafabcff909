"""The figures of `hf-topk bench` for people to read."""

from collections.abc import Iterator
from typing import Any

from ..model.errors import InputError

Rows = dict[str, str]

NAMES = {
    "dense": "dense",
    "dense_compiled": "dense, compiled",
    "dense_graph": "dense, as a CUDA graph",
    "int8": "int8 (torchao)",
    "flashhead": "FlashHead's method",
    "flashhead_graph": "FlashHead's method, as a CUDA graph",
    "hnsw": "HNSW",
    "sparse": "sparse",
    "sampling": "sparse, with the draw of a token",
    "sparse_all_logits": "sparse, all logits",
    "sparse_graph": "sparse, as a CUDA graph",
    "sparse_compiled": "sparse, all logits, compiled",
    "auto": "auto",
    "part_router": "of sparse: the router",
    "part_screen": "of sparse: the screen",
    "part_gather": "of sparse: copying the rows scored",
    "part_gather_dot": "of sparse: copying and multiplying them",
    "lossless": "lossless",
    "no_head": "no head (the ceiling)",
}


def batch_sizes(text: str) -> tuple[int, ...]:
    """Read batch sizes, such as "1,2,4".

    Raises:
        InputError: when it is no list of numbers.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"'{text}' are no batch sizes: write numbers with commas between them, such as 1,2,4")
    return tuple(int(part) for part in parts)


def tables(figures: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
    """Tables of figures: their titles, and their rows by name.

    Args:
        figures: of [`run_bench`].
    """
    yield figures["shape"], _circumstances(figures)
    yield "The head, milliseconds a token (quartiles)", _times(figures, "head")
    yield "Decoding, tokens a second (quartiles)", _rates(figures, "e2e")
    if figures["e2e_compiled"]:
        yield "Decoding compiled, tokens a second (quartiles)", _rates(figures, "e2e_compiled")
    yield "Sampling with temperature and top-p, tokens a second (quartiles)", _rates(figures, "sampling")
    yield "The head on a prompt, milliseconds (quartiles)", _times(figures, "prompt")
    yield "Batches: the head, and decoding", dict(_batches(figures))


def _circumstances(figures: dict[str, Any]) -> Rows:
    sizes, lossless, overhead = figures["sizes"], figures["lossless"], figures["step_overhead_ms"]
    scored = sizes["num_always_on"] + sizes["num_rescored"]
    return {
        "machine": f"{figures['machine']}; {figures['threads']} threads, {figures['dtype']}"
        + (f", body in {figures['body']}" if figures["body"] else ""),
        "versions": ", ".join(f"{name} {number}" for name, number in figures["versions"].items()),
        "head": f"{sizes['vocab_size']:,} x {sizes['hidden_size']:,}; {scored:,} rows scored "
        f"({scored / sizes['vocab_size']:.1%}): {sizes['num_always_on']:,} always-on tokens, "
        f"{sizes['num_rescored']:,} in {sizes['num_experts_per_tok']:,} of {sizes['num_experts']:,} experts of "
        f"{sizes['expert_size']:,}",
        "tail": f"could win, and is computed in greedy decoding, at {figures['tail_share']:.1%} of the positions",
        "auto": f"sparse up to {figures['auto_sparse_up_to']:,} positions",
        "added memory": f"{figures['added_memory_share']:.1%} of the head",
        "lossless": f"{lossless['dense_passes_per_token']:.3f} dense passes and "
        f"{lossless['forward_passes_per_token']:.3f} forward passes of the decoder a token, "
        f"{lossless['acceptance']:.1%} of the drafts accepted",
        "a step's own Python": f"{overhead['wrapper']:.3f} ms the wrapper, {overhead['sparse']:.3f} ms with the head",
    }


def _times(figures: dict[str, Any], section: str) -> Rows:
    return dict(_rows(figures, section, "ms"))


def _rates(figures: dict[str, Any], section: str) -> Rows:
    return dict(_rows(figures, section, "tok_s"))


def _rows(figures: dict[str, Any], section: str, unit: str) -> Iterator[tuple[str, str]]:
    medians, ratios, spread = figures[section], figures["ratios"][section], figures["spread"][section]
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


def _batches(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for size, medians in figures["batches"].items():
        head, e2e = (figures["ratios"]["batches"][size][part] for part in ("head", "e2e"))
        yield (
            f"batch {size}",
            f"head {medians['dense_ms']:.2f} ms dense, {medians['auto_ms']:.2f} auto: {head['auto_over_dense']:.2f} x; "
            f"decoding {medians['dense_tok_s']:.1f} tokens a second dense, {medians['auto_tok_s']:.1f} auto: "
            f"{e2e['auto_over_dense']:.2f} x",
        )
