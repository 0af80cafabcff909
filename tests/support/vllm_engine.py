"""Tiny converted models for vLLM, which runs them in this process."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# The engine in this process: it starts sooner, and tests can look into it.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# The least that vLLM takes for its KV cache on a CPU, where `kv_cache_memory_bytes` is not given.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from transformers import PreTrainedModel
from vllm import SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from .tiny_models import character_tokenizer, pack_router_of, tiny_converted, tiny_dense

# Where vLLM's CPU kernels have attention: heads of 32 and more.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 96}
OPTIONS = {"enforce_eager": True, "max_model_len": 64, "dtype": "float32", "kv_cache_memory_bytes": 1 << 24}


def small_dense(model_type: str = "llama", **choices: Any) -> PreTrainedModel:
    return tiny_dense(model_type, **{**SIZES, **choices})


def save_converted(folder: Path, dense: PreTrainedModel | None = None, **choices: Any) -> Path:
    """Write a converted model whose head runs sparse unless `choices` say otherwise; characters are its tokens."""
    model = tiny_converted(small_dense() if dense is None else dense, **{"head_mode": "sparse", **choices})
    pack_router_of(model).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def end(llm: Any) -> None:
    """End an engine of this process, so that another one can start."""
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()


PROMPTS = [[5, 9, 31], [2, 3, 5, 7, 11, 13, 17, 19], [44] * 6, [97, 33, 50, 8, 60]]
NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
LONGER = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


def tokens_of(llm: Any, params: Any = GREEDY, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """The new tokens of an engine for each prompt, greedy by default."""
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def model_of(llm: Any) -> Any:
    """The model that an engine runs in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def head_of(llm: Any) -> Any:
    """Its `SparseHeadMethod`, or None."""
    return model_of(llm).sparse_head


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in another process."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
