"""The models that are timed end to end: they share all weights and differ only in their heads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..model.sharing import copy_sharing
from ..progress import progress
from .prompts import PROMPT_LENGTH, Prompts, beginnings, random_prompts

START_TOKENS = ("bos_token_id", "decoder_start_token_id")


@dataclass(frozen=True)
class Competitors:
    """Models that share all dense tensors.

    Attributes:
        dense: the dense model of Transformers.
        sparse: the converted model.
        no_head: the dense model with constant logits, which cost next to nothing: the ceiling.
        prompts: what they decode from.
    """

    dense: PreTrainedModel
    sparse: TopKExpertsForCausalLM
    no_head: PreTrainedModel
    prompts: Prompts

    @classmethod
    def of(cls, own: TopKExpertsForCausalLM, extractor: Any = None) -> "Competitors":
        """Make them from a converted model, and reset its generation config.

        Args:
            own: the converted model.
            extractor: the feature extractor of a speech model.

        Raises:
            InputError: when a speech model has none.
        """
        head = own.head
        dense = _with_head(own.base, own.head_name, head.as_plain())
        no_head = _with_head(own.base, own.head_name, NoHead(head.out_features, head.weight.dtype).to(own.device))
        starts = {name: getattr(own.generation_config, name, None) for name in START_TOKENS}
        for model in (dense, own, no_head):
            model.generation_config = GenerationConfig(
                do_sample=False, pad_token_id=0, **starts, _from_model_config=False
            )
        return cls(dense, own, no_head, random_prompts(dense, head.out_features, extractor))


class NoHead(nn.Module):
    """A head that returns constant logits.

    It keeps a number of each hidden state: if nothing depended on these, the compiler would leave out most of the last
    layer.
    """

    logits: Tensor
    kept: Tensor

    def __init__(self, vocab_size: int, dtype: torch.dtype, most_rows: int = 64) -> None:
        """Make the logits.

        Args:
            vocab_size: V.
            dtype: of the logits.
            most_rows: the largest batch size.
        """
        super().__init__()
        logits = torch.randn(most_rows, 1, vocab_size, generator=torch.Generator().manual_seed(0))
        self.register_buffer("logits", logits.to(dtype), persistent=False)
        self.register_buffer("kept", torch.zeros(most_rows), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the first rows: hidden [B, 1, d] to [B, 1, V]."""
        rows = hidden.shape[0]
        self.kept[:rows].copy_(hidden[:, 0, 0])
        return self.logits[:rows]


def _with_head(base: PreTrainedModel, name: str, head: nn.Module) -> PreTrainedModel:
    twin = copy_sharing(base, (*base.parameters(), *base.buffers()))
    twin.set_submodule(name, head)
    return twin.eval()


@torch.inference_mode()
def sampled_text(models: Competitors, positions: int, batch: int) -> tuple[Tensor, Prompts]:
    """Let the dense model write texts, and record the inputs of its head.

    A text starts with the token that its tokenizer starts texts with, if any, or with a random one.

    Args:
        models: the competitors.
        positions: states to record, rounded up to whole steps.
        batch: number of texts.

    Returns:
        States, [P, d], and as prompts the beginnings of these texts, before the recorded positions. With an encoder
        texts continue `models.prompts`, which stay the prompts.
    """
    model = cast(Any, models.dense)
    has_encoder, steps = model.config.is_encoder_decoder, -(-positions // batch)
    begun = 0 if has_encoder else PROMPT_LENGTH - 1
    inputs = models.prompts(batch).inputs if has_encoder else {"input_ids": _first_tokens(models, batch)}
    with _recorded(model, begun + steps) as states:
        texts = model.generate(**inputs, do_sample=True, max_new_tokens=begun + steps)
    return torch.cat(states[begun:]), models.prompts if has_encoder else beginnings(texts)


def _first_tokens(models: Competitors, batch: int) -> Tensor:
    """Token ids, [B, 1]."""
    first = models.dense.generation_config.bos_token_id
    if first is None:
        return cast(Tensor, models.prompts(batch).inputs["input_ids"])[:, :1]
    return torch.full((batch, 1), first, device=models.dense.device)


@contextmanager
def _recorded(model: PreTrainedModel, steps: int) -> Iterator[list[Tensor]]:
    """Inside the context, list what enters the head at the last position of each step, [B, d]."""
    states: list[Tensor] = []
    with progress("Sampling text", steps, "steps") as advance:

        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            states.append(arguments[0][:, -1].clone())
            advance()

        hook = cast(nn.Linear, model.get_output_embeddings()).register_forward_pre_hook(record)
        try:
            yield states
        finally:
            hook.remove()
