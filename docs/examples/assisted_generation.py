"""A converted model as the draft model of another one: python assisted_generation.py [MODEL [TARGET]].

TARGET is a dense model with the same tokenizer, larger than MODEL where this is to pay. Without it the target is the
dense model that MODEL was made from, which shows what the sparse head drafts, and gains nothing.
"""

import sys
import time
from typing import Any

import torch
from common import Output, load
from text_generation import PROMPTS
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def load_dense(folder: str) -> PreTrainedModel:
    """Load a dense model, or the dense model in the folder of a converted one."""
    config: Any = AutoConfig.from_pretrained(folder)
    dense_config = config.text_config if config.model_type == "topk_experts" else config
    return AutoModelForCausalLM.from_pretrained(folder, config=dense_config, dtype=torch.float32)


def main(folder: str | None = None, target_folder: str | None = None, new_tokens: int = 64) -> dict[str, Output]:
    """Write with the target alone and with each kind of help; print and return what was written."""
    model, tokenizer = load(folder)
    draft = load_dense(model.name_or_path)
    target = load_dense(target_folder or model.name_or_path)
    model.head_mode = "sparse"
    ways: dict[str, tuple[PreTrainedModel, dict[str, Any]]] = {
        "target alone": (target, {}),
        "drafted by the dense model": (target, {"assistant_model": draft}),
        "drafted by the sparse head": (target, {"assistant_model": model}),
        "MODEL alone, lossless": (model, {"lossless": True}),
    }
    passes = [0]
    target.register_forward_hook(lambda *_: passes.append(passes.pop() + 1))
    outputs = {name: Output() for name in ways}
    target_passes = dict.fromkeys(ways, 0)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        for name, (writer, choices) in ways.items():
            passes[0], began = 0, time.perf_counter()
            tokens = writer.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **choices)
            outputs[name].seconds += time.perf_counter() - began
            outputs[name].answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
            target_passes[name] += passes[0]
    alone = outputs["target alone"]
    print(f"{'':30}{'tokens/s':>10}{'identical to the target':>26}{'target passes/token':>22}")
    for name, output in outputs.items():
        same = f"{output.same_tokens(alone):,} of {alone.tokens:,}"
        per_token = target_passes[name] / output.tokens
        print(f"{name:30}{output.tokens / output.seconds:>10.1f}{same:>26}{per_token:>22.3f}")
    return outputs


if __name__ == "__main__":
    main(*sys.argv[1:])
