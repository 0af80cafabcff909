"""Keeps the head whole in every process of a distributed model, and refuses one that is sharded."""

from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from .configuration_topk_experts import TopKExpertsConfig
from .errors import InputError


def full_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of a weight, even while DeepSpeed (ZeRO stage 3) replaces it by an empty tensor."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def is_one_of_several() -> bool:
    """Whether this process is one of several that may have to compute the same logits."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def check_whole(head: nn.Linear) -> None:
    """Refuse a head of which this process has only a shard.

    Args:
        head: a head of V rows; `weight` is [V, d] if it is whole.

    Raises:
        InputError: when it is sharded.
    """
    if torch.compiler.is_compiling():  # checked by the first call in eager mode
        return
    weight = head.weight
    if type(weight) is nn.Parameter and weight.shape == (head.out_features, head.in_features):  # no DTensor
        return
    is_split = hasattr(weight, "placements")  # a DTensor, whose shape is that of the whole tensor
    if is_split or tuple(weight.shape) != (head.out_features, head.in_features):
        here = cast(Any, weight).to_local().shape if is_split else weight.shape
        raise InputError(
            f"the head's weight is sharded over processes, and this one has a part of shape {list(here)} of "
            f"{[head.out_features, head.in_features]}: exclude the head, and input embeddings tied to it, from the "
            "tensor-parallel plan and from modules that are sharded separately, call the model and not its head, or "
            "use ZeRO stage 2"
        )


class WholeHeadMixin:
    """Excludes the head from tensor parallelism: it reads few rows, which are known only in the forward pass."""

    base: PreTrainedModel
    base_model_prefix: str
    config: TopKExpertsConfig
    head_name: str
    _tp_plan: dict[str, str] | None

    def post_init(self) -> None:
        """Prepare as Transformers does, with the dense model's tensor-parallel plan for all but the head."""
        super().post_init()  # type: ignore[misc]
        whole = {self.base.get_output_embeddings()}
        if self.config.tie_word_embeddings:
            whole.add(self.base.get_input_embeddings())
        names = {f"{self.base_model_prefix}.{name}" for name, module in self.base.named_modules() if module in whole}
        self._tp_plan = {
            part: style
            for part, style in (self._tp_plan or {}).items()
            if not names & {part, part.rpartition(".")[0]}  # a module or one of its tensors
        }
