"""A table of a converted model in vLLM, against Transformers and against vLLM's own dense model.

.venv-vllm/bin/python -P tests/vllm/figures.py OUT --text convert/demo/kwaidan.txt
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

import hf_topk  # noqa: F401  # registers the model class with Transformers

PROMPT_LENGTH, NEW_TOKENS, SCORED_PROMPTS, DRAFTED = 24, 64, 20, 6
SPARSE, DENSE = {"head_mode": "sparse"}, {"head_mode": "dense"}
Tokens = list[list[int]]


def prompts_from(text: Path, tokenizer: Any, count: int) -> Tokens:
    """Pieces of a text, evenly spread over it."""
    tokens = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else tokenizer("a")["input_ids"][:1]
    first = first if first == [tokenizer.bos_token_id] else []
    step = (len(tokens) - PROMPT_LENGTH) // count
    return [first + tokens[number * step :][:PROMPT_LENGTH] for number in range(count)]


def in_vllm(folder: str, prompts: Tokens, *, scores: bool = False, **options: Any) -> tuple[Tokens, list[Any], float]:
    """Greedy tokens, log-probabilities of some prompts, and the share of draft tokens accepted, if any."""
    common = {"enforce_eager": True, "dtype": "float32", "max_model_len": 256, "disable_log_stats": False}
    llm = LLM(folder, **{**common, **options})
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    tokens = [list(answer.outputs[0].token_ids) for answer in llm.generate(given, greedy, use_tqdm=False)]
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    drafted = counts.get("vllm:spec_decode_num_draft_tokens", 0)
    accepted = counts["vllm:spec_decode_num_accepted_tokens"] / drafted if drafted else 0.0
    scored: list[Any] = []
    if scores:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        scored = [answer.prompt_logprobs for answer in llm.generate(given[:SCORED_PROMPTS], params, use_tqdm=False)]
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return tokens, scored, accepted


def in_transformers(model: Any, prompts: Tokens) -> Tokens:
    """Greedy tokens, all prompts at once."""
    given = torch.tensor(prompts)
    made = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[:, given.shape[1] :].tolist()


@torch.no_grad()
def differences(model: Any, prompts: Tokens, scored: list[Any]) -> torch.Tensor:
    """Differences of vLLM's log-probabilities of the prompts' tokens from Transformers'."""
    found = []
    for prompt, logprobs in zip(prompts, scored, strict=False):
        expected = model(torch.tensor([prompt])).logits[0].float().log_softmax(dim=-1)
        found += [logprobs[i][token].logprob - expected[i - 1, token].item() for i, token in enumerate(prompt) if i]
    return torch.tensor(found).abs()


def same(some: Tokens, others: Tokens) -> str:
    """The share of equal tokens."""
    equal = sum(a == b for left, right in zip(some, others, strict=True) for a, b in zip(left, right, strict=True))
    return f"{equal} of {sum(map(len, some))}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a converted model")
    parser.add_argument("--text", type=Path, default=Path("convert/demo/kwaidan.txt"), help="what prompts are from")
    parser.add_argument("--prompts", type=int, default=100, help="how many")
    arguments = parser.parse_args()
    folder = arguments.folder
    prompts = prompts_from(arguments.text, AutoTokenizer.from_pretrained(folder), arguments.prompts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.head_mode = "sparse"
    expected = in_transformers(model, prompts)
    sparse, scored, _ = in_vllm(folder, prompts, scores=True, hf_overrides=SPARSE)
    away = differences(model, prompts, scored)
    print(f"greedy tokens equal to those of Transformers, sparse | {same(sparse, expected)}")
    print(
        f"log-probabilities of prompts, mean distance to Transformers' | {away.mean():.1e} of {len(away)}, all finite"
    )
    dense, _, _ = in_vllm(folder, prompts, hf_overrides=DENSE)
    every_expert = {**SPARSE, "num_experts_per_tok": model.config.num_experts}
    del model
    all_experts, _, _ = in_vllm(folder, prompts, hf_overrides=every_expert)
    print(f"all experts, tokens equal to the dense model's | {same(all_experts, dense)}")
    draft = {"model": folder, "num_speculative_tokens": DRAFTED, "method": "draft_model"}
    # One at a time: for a batch head mode `auto` may draft with the dense head, which is always accepted.
    lossless, _, accepted = in_vllm(folder, prompts, hf_overrides=DENSE, speculative_config=draft, max_num_seqs=1)
    print(f"lossless, tokens equal to the dense model's | {same(lossless, dense)}")
    print(f"drafts accepted, of {DRAFTED} a step | {accepted:.1%}")


if __name__ == "__main__":
    main()
