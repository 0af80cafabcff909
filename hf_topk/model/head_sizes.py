"""The sizes of a sparse head, and the bytes that it reads and adds, in its dtype on disk."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_topk_experts import TopKExpertsConfig
from .router import Router
from .tail import Tail


def setting(name: str) -> Any:
    """A property backed by an entry of the configuration, which checks it."""
    read = object.__getattribute__  # Transformers' own takes three times as long
    return property(lambda head: read(head.config, name), lambda head, value: setattr(head.config, name, value))


class SizedHead(nn.Linear):
    """The sizes of a dense head with experts, a router and a tail.

    Attributes:
        config: the model's configuration.
        head_mode, num_experts_per_tok, num_rescored, sparse_max_positions: entries of the configuration, read and set.
    """

    always_on_ids: Tensor
    expert_ids: Tensor
    router: Router
    tail: Tail
    combine: str
    config: TopKExpertsConfig
    head_mode = setting("head_mode")
    num_experts_per_tok = setting("num_experts_per_tok")
    num_rescored = setting("num_rescored")
    sparse_max_positions = setting("sparse_max_positions")
    _router_rank, _tail_rank = setting("router_rank"), setting("tail_rank")
    _stored_type: torch.dtype | None = None

    @property
    def num_experts(self) -> int:
        """M."""
        return self.expert_ids.shape[0]

    @property
    def expert_size(self) -> int:
        """S."""
        return self.expert_ids.shape[1]

    @property
    def num_always_on(self) -> int:
        """A."""
        return self.always_on_ids.shape[0]

    @property
    def screens(self) -> bool:
        """Whether the picked experts' tokens are screened, so that only the likeliest of them get exact logits."""
        if self.combine != "exact":
            return False
        (num_experts, expert_size), picked = self.expert_ids.shape, self.num_experts_per_tok
        return picked < num_experts and self.num_rescored < picked * expert_size

    @property
    def sizes_of_sparse(self) -> tuple[int | str, ...]:
        """The sizes that the time of the sparse head depends on, without those of the weight."""
        ranks = self._router_rank, self._tail_rank
        return self.num_experts, self.num_experts_per_tok, self.num_rescored, self.combine, *ranks

    @property
    def stored_type(self) -> torch.dtype:
        """The dtype on disk: that of the weight unless another one was set."""
        return self._stored_type or self.weight.dtype

    @stored_type.setter
    def stored_type(self, dtype: torch.dtype) -> None:
        self._stored_type = dtype

    def bytes_read(self) -> float:
        """Bytes of head, router and tail that the sparse head reads for one position."""
        row = self.dense_bytes() / self.out_features
        picked = self.num_experts_per_tok
        routed = min(self.num_rescored, picked * self.expert_size) if self.screens else picked * self.expert_size
        read = (self.num_always_on + routed) * row + self._bytes_stored(self.router.state_dict().values())
        of_an_expert = self._bytes_stored(tensor[:1] for tensor in self.tail.read_by_expert())
        return read + self._bytes_stored(self.tail.read_always()) + self.screens * picked * of_an_expert

    def dense_bytes(self) -> int:
        """Bytes of the dense head, weight and bias."""
        return self._bytes_stored([self.weight] if self.bias is None else [self.weight, self.bias])

    def added_bytes(self) -> int:
        """Bytes of the tensors that conversion added to the dense head."""
        return self._bytes_stored(self.additions().values())

    def _bytes_stored(self, tensors: Iterable[Tensor]) -> int:
        floats = self.stored_type.itemsize
        return sum(one.numel() * (floats if one.is_floating_point() else one.itemsize) for one in tensors)

    def additions(self) -> dict[str, Tensor]:
        """The tensors that conversion added to the dense head, by name: token ids, router, tail and combiner."""
        everything: dict[str, Tensor] = self.state_dict()
        return {name: tensor for name, tensor in everything.items() if name not in ("weight", "bias")}
