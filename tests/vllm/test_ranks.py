"""Two ranks of tensor parallelism, each with half of the rows, generate the tokens of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.vllm_engine import NEW_TOKENS, save_converted, small_dense, tokens_of


@pytest.mark.parametrize("choices", [{"num_rescored": 5}, {"head_mode": "auto", "sparse_max_positions": None}])
def test_two_ranks_generate_the_tokens_of_one(
    tmp_path: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any]
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else each rank asks for a NUMA node
    folder = save_converted(tmp_path, small_dense("gptj", tied=False, bias=True, rotary_dim=16), **choices)
    two = tokens_of(start(folder, tensor_parallel_size=2))
    one = tokens_of(start(folder))
    if "head_mode" in choices:  # which may be dense for one and sparse for two
        assert [len(tokens) for tokens in two] == [NEW_TOKENS] * len(one)
    else:
        assert two == one
