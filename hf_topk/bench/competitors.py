"""The models that are timed end to end: they share all weights and differ only in their heads."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..model.modeling_topk_experts import TopKExpertsForCausalLM
from ..model.sharing import copy_sharing
from ..progress import progress
from .prompts import Prompts, random_prompts


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
        linear = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        linear.weight, linear.bias = head.weight, head.bias
        dense = _with_head(own.base, own.head_name, linear)
        no_head = _with_head(own.base, own.head_name, NoHead(head.out_features, head.weight.dtype).to(own.device))
        start = getattr(own.generation_config, "decoder_start_token_id", None)
        for model in (dense, own, no_head):
            model.generation_config = GenerationConfig(
                do_sample=False, pad_token_id=0, decoder_start_token_id=start, _from_model_config=False
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
def recorded_states(model: PreTrainedModel, prompts: Prompts, positions: int, batch: int) -> Tensor:
    """Record the inputs of the head while a dense model samples text from random prompts.

    Args:
        model: a dense model.
        prompts: what it decodes from.
        positions: states to record, rounded up to whole steps.
        batch: batch size.

    Returns:
        States, [P, d].
    """
    head = cast(nn.Linear, model.get_output_embeddings())
    steps = -(-positions // batch)
    states: list[Tensor] = []
    with progress("Recording hidden states", steps, "steps") as advance:

        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            states.append(arguments[0][:, -1].clone())
            advance()

        hook = head.register_forward_pre_hook(record)
        try:
            cast(Any, model).generate(**prompts(batch).inputs, do_sample=True, max_new_tokens=steps)
        finally:
            hook.remove()
    return torch.cat(states)
