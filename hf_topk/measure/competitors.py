"""The models that are timed end to end: one set of weights, and several objects that differ in their head alone."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from ..modeling_topk_experts import TopKExpertsForCausalLM
from ..progress import progress
from .crossover import fastest_up_to


@dataclass(frozen=True)
class Competitors:
    """Models that share all dense tensors.

    Attributes:
        dense: the dense model as Transformers has it.
        sparse: the converted model with tail `prior`.
        sparse_default_tail: the converted model with the tail it has, None if that is `prior`.
        no_head: the dense model whose logits are there without any work: the ceiling.
    """

    dense: PreTrainedModel
    sparse: TopKExpertsForCausalLM
    sparse_default_tail: TopKExpertsForCausalLM | None
    no_head: PreTrainedModel

    @classmethod
    def of(cls, own: TopKExpertsForCausalLM) -> "Competitors":
        """Make them from a converted model, whose generation config becomes an empty one."""
        head = own.head
        linear = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        linear.weight, linear.bias = head.weight, head.bias
        dense = _with_head(own.base, own.head_name, linear)
        no_head = _with_head(own.base, own.head_name, NoHead(head.out_features, head.weight.dtype))
        is_prior = own.config.tail == "prior"
        sparse = own if is_prior else _with_prior_tail(own, dense)
        made = cls(dense, sparse, None if is_prior else own, no_head)
        for model in (dense, sparse, own, no_head):
            model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        return made

    @property
    def converted(self) -> list[TopKExpertsForCausalLM]:
        """The converted models."""
        return [model for model in (self.sparse, self.sparse_default_tail) if model is not None]

    def choose_sparse_max_positions(self, states: Tensor) -> None:
        """Measure up to how many positions each converted model is the faster one here.

        Args:
            states: hidden states to draw from, [P, d].
        """
        for model in self.converted:
            model.head.sparse_max_positions = fastest_up_to(model.head, states)


class NoHead(nn.Module):
    """Answers with logits that are there already."""

    logits: Tensor

    def __init__(self, vocab_size: int, dtype: torch.dtype, most_rows: int = 32) -> None:
        """Make the logits.

        Args:
            vocab_size: V.
            dtype: of the logits.
            most_rows: the largest batch that will be asked for.
        """
        super().__init__()
        logits = torch.randn(most_rows, 1, vocab_size, generator=torch.Generator().manual_seed(0))
        self.register_buffer("logits", logits.to(dtype), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the first rows: hidden [B, 1, d] to [B, 1, V]."""
        return self.logits[: hidden.shape[0]]


def _with_head(base: PreTrainedModel, name: str, head: nn.Module) -> PreTrainedModel:
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    twin = copy.deepcopy(base, memo=cast(dict[int, Any], shared))
    twin.set_submodule(name, head)
    return twin.eval()


def _with_prior_tail(own: TopKExpertsForCausalLM, dense: PreTrainedModel) -> TopKExpertsForCausalLM:
    """The same experts and router, and the tail that costs least."""
    config = copy.deepcopy(own.config)
    config.tail = "prior"
    model = TopKExpertsForCausalLM.from_dense(dense, config)
    for added in model.head.children():
        added.to(own.head.weight.dtype)
    additions = {name: tensor for name, tensor in own.head.additions().items() if not name.startswith("tail.")}
    model.head.load_state_dict(additions, strict=False)
    return model


@torch.inference_mode()
def recorded_states(model: PreTrainedModel, positions: int, batch: int, prompt_length: int) -> Tensor:
    """Hidden states that enter the head while a dense model samples text of its own from random tokens.

    Args:
        model: a dense model.
        positions: states to record, and a few more if they do not fill the last step.
        batch: texts that are written side by side.
        prompt_length: random tokens that each starts with.

    Returns:
        States, [P, d].
    """
    head = cast(nn.Linear, model.get_output_embeddings())
    prompts = torch.randint(head.out_features, (batch, prompt_length))
    steps = -(-positions // batch)
    states: list[Tensor] = []
    with progress("Recording hidden states", steps, "steps") as advance:

        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            states.append(arguments[0][:, -1].clone())
            advance()

        hook = head.register_forward_pre_hook(record)
        try:
            cast(Any, model).generate(prompts, do_sample=True, top_k=0, max_new_tokens=steps)
        finally:
            hook.remove()
    return torch.cat(states)
