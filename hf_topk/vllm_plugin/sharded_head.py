"""A converted model's head on the rows of vLLM's head layer: all of them, or one rank's shard."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ..model.configuration_topk_experts import TopKExpertsConfig
from ..model.head import TopKExpertsHead
from ..model.kernels import gather_dot


class ShardedHead(TopKExpertsHead):
    """A [`TopKExpertsHead`] whose rows are sharded over the ranks of tensor parallelism.

    Each rank routes and screens all positions, and multiplies the picked rows in its own shard. The exact logits are
    summed over the ranks, so all ranks have the same.

    Attributes:
        sum_over_ranks: sums a tensor over the ranks; the identity before weights are loaded.
    """

    def __init__(self, layer: VocabParallelEmbedding, config: TopKExpertsConfig) -> None:
        """Build the head of a layer, on the default device; its added tensors are not set yet.

        Args:
            layer: vLLM's head.
            config: the converted model's configuration.

        Raises:
            InputError: when the configuration does not fit the vocabulary.
        """
        super().__init__(nn.Linear(layer.embedding_dim, layer.org_vocab_size, bias=False, device="meta"), config)
        self.first = layer.shard_indices.org_vocab_start_index
        self.last = layer.shard_indices.org_vocab_end_index
        self.num_rows_held = layer.num_embeddings_per_partition
        self.num_ranks = layer.tp_size
        self.sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def take_rows(self, layer: VocabParallelEmbedding) -> None:
        """Share weight and bias, without rows of padding, with a loaded layer."""
        held, bias = self.last - self.first, getattr(layer, "bias", None)
        self.weight = nn.Parameter(layer.weight[:held], requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias[:held], requires_grad=False))

    def local_logits(self, hidden: Tensor) -> Tensor:
        """Sparse logits of this rank's rows, zeros for padding: [N, d] to [N, rows of this rank]."""
        logits = self.sparse_logits(hidden)
        padding = self.num_rows_held - (self.last - self.first)
        if self.num_ranks > 1:
            logits = logits[:, self.first : self.last].contiguous()  # for the gathering of logits
        return F.pad(logits, (0, padding)) if padding else logits

    def check_rows(self) -> None:
        """Do nothing: this rank has only its own shard."""

    def exact_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """As in [`TopKExpertsHead`], with the rows of all ranks."""
        if self.num_ranks == 1:
            return super().exact_logits(hidden, ids)
        is_held = (ids >= self.first) & (ids < self.last)
        logits = gather_dot(hidden, self.weight, self.bias, torch.where(is_held, ids - self.first, 0))
        return self.sum_over_ranks(logits.masked_fill(~is_held, 0))

    def logits_of_experts(self, hidden: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """As in [`TopKExpertsHead`], with the rows of all ranks."""
        if self.num_ranks == 1:
            return super().logits_of_experts(hidden, experts)
        logits = self.exact_logits(hidden, self.scored_ids(experts))
        always, routed = logits.split([self.num_always_on, experts.shape[1] * self.expert_size], dim=-1)
        return always, routed.unflatten(-1, (-1, self.expert_size))
