"""vLLM's speculative decoding with a converted model's sparse head as its own draft."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.vllm_engine import LONGER, head_of, model_of, tokens_of

from hf_topk import InputError

DENSE = {"head_mode": "dense"}


def drafting(folder: Path) -> dict[str, Any]:
    return {"speculative_config": {"model": str(folder), "num_speculative_tokens": 3, "method": "draft_model"}}


def test_tokens_are_the_dense_models_and_drafts_are_sparse(
    folder: Path, dense_tokens: list[list[int]], start: Callable[..., Any]
) -> None:
    llm = start(folder, hf_overrides=DENSE, disable_log_stats=False, **drafting(folder))
    assert tokens_of(llm, LONGER) == dense_tokens
    assert model_of(llm).sparse_head is None
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert 0 < counts["vllm:spec_decode_num_accepted_tokens"] <= counts["vllm:spec_decode_num_draft_tokens"]
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    draft = runner.drafter.model.sparse_head.counters.counts
    assert draft["hf_topk:sparse_steps"] > 0
    assert draft["hf_topk:dense_steps"] == 0


def test_draft_tokens_are_not_verified_with_the_sparse_head(folder: Path, start: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="verified with the dense head: serve it with"):
        start(folder, **drafting(folder))


def test_prompt_lookup_is_verified_with_the_sparse_head(folder: Path, start: Callable[..., Any]) -> None:
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    expected = tokens_of(start(folder), LONGER)
    llm = start(folder, speculative_config=lookup)
    assert tokens_of(llm, LONGER) == expected
    assert head_of(llm).counters.counts["hf_topk:dense_steps"] == 0
