"""Computes logits in vLLM with a converted model's head: sparse up to some number of positions, dense beyond."""

import logging
import sys

import torch
from torch import Tensor
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from ..model.crossover import MOST_POSITIONS, is_faster
from .counters import StepCounters
from .sharded_head import ShardedHead

logger = logging.getLogger("vllm.hf_topk")


class SparseHeadMethod(UnquantizedEmbeddingMethod):
    """The `quant_method` of vLLM's head layer, by which vLLM computes logits.

    Sampling, log-probabilities, penalties, grammars and batching stay vLLM's own, on logits of the whole vocabulary.

    Attributes:
        dense: the layer's own method, for the dense head, and for input embeddings with the same rows.
        head: the sparse head on the same rows.
        most_positions: the largest number of positions that runs sparse; 0 before weights are loaded.
        counters: of the calls.
    """

    def __init__(self, layer: VocabParallelEmbedding, head: ShardedHead) -> None:
        """Wrap a layer's method.

        Args:
            layer: vLLM's head.
            head: the sparse head on its rows.
        """
        self.dense: QuantizeMethodBase = layer.quant_method
        self.head = head
        self.most_positions = 0
        self.counters = StepCounters(head, is_counting=layer.tp_rank == 0)

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        """Prepare the weights, and measure up to how many positions the sparse head is faster."""
        self.dense.process_weights_after_loading(layer)
        self.head.take_rows(layer)
        self.most_positions = self._most_positions(layer)
        # Not before: the number of calls in the measurement differs between ranks.
        self.head.sum_over_ranks = tensor_model_parallel_all_reduce
        if layer.tp_rank == 0 and self.most_positions < sys.maxsize:
            logger.info("hf-topk: the head runs sparse up to %d positions, dense beyond", self.most_positions)

    def _most_positions(self, layer: VocabParallelEmbedding) -> int:
        """The largest number of positions to run sparse, the same on all ranks."""
        head = self.head
        if head.head_mode == "sparse":
            return sys.maxsize
        if head.sparse_max_positions is not None:
            return head.sparse_max_positions
        most, tried = 0, 1
        sizes = ("vllm", head.num_ranks, *head.sizes_of_sparse)

        def dense(hidden: Tensor) -> Tensor:
            return self.dense.apply(layer, hidden, self.head.bias)

        while tried <= MOST_POSITIONS and is_faster(head.local_logits, dense, head, tried, *sizes):
            most, tried = tried, 2 * tried
        if head.num_ranks == 1:
            return most
        return int(get_tp_group().broadcast_object(most))

    def apply(self, layer: VocabParallelEmbedding, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank's rows: hidden states [..., d] to [..., rows of this rank]."""
        hidden = x.reshape(-1, x.shape[-1])
        is_sparse = len(hidden) <= self.most_positions
        self.counters.count(len(hidden), is_sparse)
        if not is_sparse:
            return self.dense.apply(layer, x, bias)
        return self.head.local_logits(hidden).view(*x.shape[:-1], -1)

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        """Input embeddings, by vLLM's own method."""
        return self.dense.embedding(layer, input_)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding) -> torch.nn.Module:
        """Tie the weights, by vLLM's own method."""
        return self.dense.tie_weights(layer, embed_tokens)
