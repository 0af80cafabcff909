"""Tiny models and checkpoints for the tests, made in memory without a network."""

import inspect
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_topk import TopKExpertsConfig, TopKExpertsForCausalLM
from hf_topk.convert.steps.pack_router_and_tail import metric_of, pack_router
from hf_topk.model.encoder_decoder import converted_class
from hf_topk.windows import Window

VOCAB_SIZE = 100
TINY_SHAPE = {
    "model_type": "llama",
    "vocab_size": 20_000,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WORDS = [f"w{number}" for number in range(VOCAB_SIZE - 2)]


def tiny_dense(model_type: str = "llama", *, tied: bool = True, bias: bool = False, **choices: Any) -> PreTrainedModel:
    """A random dense model of 100 tokens and 32 dimensions, with logits far enough apart to exceed rounding errors."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    config = AutoConfig.for_model(
        model_type,
        **{**sizes, **choices},
        vocab_size=VOCAB_SIZE,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        tie_word_embeddings=tied,
    )
    dense = AutoModelForCausalLM.from_config(config).eval()
    head = dense.get_output_embeddings()
    if bias:
        head.bias = nn.Parameter(torch.randn(VOCAB_SIZE))
    with torch.no_grad():
        head.weight.mul_(20)
    return dense


def randomise(module: nn.Module, seed: int = 3) -> None:
    """Set a router or a tail to random values, with scores about one nat apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.dtype == torch.uint8:
                tensor.random_(0, 256, generator=generator)
            elif tensor.dtype == torch.int8:
                tensor.random_(-127, 128, generator=generator)
            elif name == "basis_scales":
                tensor.uniform_(5e-4, 1e-3, generator=generator)
            else:
                tensor.normal_(std=0.3, generator=generator)


def tiny_converted(dense: PreTrainedModel | None = None, **choices: Any) -> TopKExpertsForCausalLM:
    """A converted model with random experts, router and tail: by default 8 always-on tokens and 6 experts of 16."""
    dense = tiny_dense() if dense is None else dense
    vocab_size = dense.get_output_embeddings().weight.shape[0]
    sizes = {"num_experts": 6, "expert_size": 16, "num_always_on": 8, "num_experts_per_tok": 2, "router_rank": 4}
    sizes |= {"tail_rank": 4, "sparse_max_positions": 16}  # else measured, and 0 for so small a head
    model = converted_class(dense.config).from_dense(dense, TopKExpertsConfig(**{**sizes, **choices}))
    head = model.head
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        head.always_on_ids.copy_(order[: head.num_always_on].sort().values)
        routed = order[head.num_always_on :]
        for expert, ids in enumerate(routed.split(head.expert_size)):
            head.expert_ids[expert] = torch.cat([ids, ids[:1].expand(head.expert_size - len(ids))])
        randomise(head.router)
        randomise(head.tail)
        prior = head.tail.log_prior
        prior.copy_(prior - head.mask_padding(prior, head.expert_ids).logsumexp(dim=-1, keepdim=True))
        repeats = head.expert_ids == head.expert_ids[:, :1]
        for name, tensor in head.tail.named_buffers():  # padding repeats a token: it has the same tail
            if name in ("codes_4bit", "codes_2bit", "bias", "log_prior"):
                tensor[repeats] = tensor[:, :1].expand_as(tensor)[repeats]
    return model


def pack_router_of(model: TopKExpertsForCausalLM) -> TopKExpertsForCausalLM:
    """Pack a converted model's router, as conversion does; return the model."""
    head = model.head
    states = torch.randn(200, head.in_features, generator=torch.Generator().manual_seed(4))
    pack_router(head.router, metric_of(states), head.weight.dtype)
    head.router.to(head.weight.dtype)
    model.config.router_packed = True
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny models: words `w0` to `w97`, an end-of-text and a padding token."""
    vocabulary = {"<|endoftext|>": 0, "<pad>": 1, **{word: number + 2 for number, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        padding_side="left",
    )


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII characters; three ids of the tiny models have no token."""
    vocabulary = {"<|endoftext|>": 0, "<pad>": 1, **{chr(32 + number): number + 2 for number in range(95)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}{{ 'w1' if add_generation_prompt }}"


def tiny_checkpoint(folder: Path, dense: PreTrainedModel | None = None, *, chats: bool = False) -> Path:
    """Save a tiny dense model and its tokenizer, with a chat template if `chats`."""
    (tiny_dense() if dense is None else dense).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if chats:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# tiny\n", encoding="utf-8")
    return folder


def with_cache(cache: Any) -> dict[str, Any]:
    """A KV cache as an argument of a model; Transformers 5.24 renamed it."""
    is_renamed = "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    return {"cache" if is_renamed else "past_key_values": cache}


def tiny_text(file: Path, documents: int = 4, words: int = 200) -> Path:
    """Write random text to a .jsonl file, one document per line."""
    generator = torch.Generator().manual_seed(2)
    lines = []
    for _ in range(documents):
        chosen = torch.randint(len(WORDS), (words,), generator=generator).tolist()
        lines.append('{"text": "' + " ".join(WORDS[number] for number in chosen) + '"}')
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


QUICK = {
    "expert_size": 16,
    "positions": 600,
    "window_length": 32,
    "distill_steps": 20,
    "router_rank": 4,
    "tail_rank": 4,
    "sparse_max_positions": 16,
}


def some_windows(documents: int = 12, length: int = 40) -> list[Window]:
    """Windows of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = range(length, length - documents, -1)
    return [
        Window(number, tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()))
        for number, length in enumerate(lengths)
    ]
