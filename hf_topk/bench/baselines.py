"""Baseline heads: int8, an HNSW index of nearest neighbours, and FlashHead's clusters.

Each is a callable on hidden states, [N, d]. FlashHead returns the next tokens, [N], without the cost of making logits;
the others return logits, [N, V].
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.errors import InputError
from ..progress import progress
from .flashhead import CLUSTER_SIZE, FlashHead

BASELINES = ("int8", "flashhead", "hnsw")
INSTALL = "pip install 'hf-topk[bench]'"

# Parameters of vector-index-embedding, the published HNSW head.
HNSW_NEIGHBOURS = 32
HNSW_EF = 200
HNSW_CANDIDATES = 50
ROWS_ADDED_AT_ONCE = 2048


class MissingPackageError(InputError):
    """A baseline needs an optional package that is not installed."""


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that shares a weight, [V, d], and a bias, [V] or None."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def int8_head(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of the dense head with torchao's int8 weights, one scale per row.

    Args:
        weight: W, [V, d].
        bias: [V] or None.

    Raises:
        MissingPackageError: when torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingPackageError(f"the int8 head needs torchao: {INSTALL}") from error
    holder = nn.Sequential(linear_of(weight.clone(), bias))  # torchao quantises only children of a module
    quantize_(holder, Int8WeightOnlyConfig())
    return holder


def has_compiler() -> bool:
    """Whether the C++ compiler that `torch.compile` needs on a CPU is installed."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def compiled(run: Callable[[Tensor], Any], example: Tensor) -> Callable[[Tensor], Any]:
    """Compile a head with `torch.compile`, in one graph.

    Args:
        run: the head, a callable on hidden states [N, d].
        example: hidden states to compile it with at once.
    """
    ready = torch.compile(run, fullgraph=True, dynamic=False)
    with warnings.catch_warnings():  # of torch about its own internals and cache
        warnings.simplefilter("ignore")
        ready(example)
    return ready


def captured(run: Callable[[Tensor], Any], example: Tensor) -> Callable[[Tensor], None]:
    """Capture a head in a CUDA graph.

    Args:
        run: the head, a callable on hidden states [N, d].
        example: hidden states on the device to capture it with.
    """
    given, graph = example.clone(), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up, outside of the graph
        run(given)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        run(given)

    def replay(hidden: Tensor) -> None:
        given.copy_(hidden)
        graph.replay()

    return replay


def random_flashhead(weight: Tensor, bias: Tensor | None, seed: int = 0) -> FlashHead:
    """FlashHead with random clusters of 16: its cost does not depend on their tokens.

    Args:
        weight: W, [V, d].
        bias: [V] or None.
        seed: of the clusters.
    """
    vocab_size = len(weight)
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    missing = -vocab_size % CLUSTER_SIZE
    first_of_last = order[(vocab_size - 1) // CLUSTER_SIZE * CLUSTER_SIZE]
    clusters = torch.cat([order, first_of_last.expand(missing)]).view(-1, CLUSTER_SIZE)
    return FlashHead(weight, bias, clusters)


class HnswHead:
    """A head that searches an index of nearest neighbours for candidates, the only tokens that get a logit.

    Malkov and Yashunin 2016, "Efficient and robust approximate nearest neighbor search using Hierarchical Navigable
    Small World graphs" (https://arxiv.org/abs/1603.09320), by hnswlib, on the inner product with the rows of the head.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, ef: int = HNSW_EF, candidates: int = HNSW_CANDIDATES
    ) -> None:
        """Build the index, with as many threads as torch uses.

        Args:
            weight: W, [V, d].
            bias: [V] or None; another column of the index.
            ef: size of the candidate list of a search.
            candidates: tokens that get a logit.

        Raises:
            MissingPackageError: when hnswlib is not installed.
        """
        try:
            import hnswlib
        except ImportError as error:
            raise MissingPackageError(f"the HNSW head needs hnswlib: {INSTALL}") from error
        vocab_size, hidden_size = weight.shape
        self._vocab_size, self._candidates, self._has_bias = vocab_size, min(candidates, vocab_size), bias is not None
        self._threads = torch.get_num_threads()
        self._index = hnswlib.Index(space="ip", dim=hidden_size + self._has_bias)
        self._index.init_index(vocab_size, M=HNSW_NEIGHBOURS, ef_construction=HNSW_EF, random_seed=0)
        self._index.set_ef(max(ef, self._candidates))
        with progress("Building the HNSW index", vocab_size, "rows") as advance:
            for start in range(0, vocab_size, ROWS_ADDED_AT_ONCE):
                some = slice(start, start + ROWS_ADDED_AT_ONCE)
                rows = weight[some].detach().float().cpu()
                if bias is not None:
                    rows = torch.cat([rows, bias[some, None].detach().float().cpu()], dim=-1)
                self._index.add_items(rows.numpy(), torch.arange(start, start + len(rows)).numpy(), self._threads)
                advance(len(rows))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of the candidates, minus infinity elsewhere: hidden [N, d] to [N, V], in the dtype of `hidden`."""
        queries = hidden.float().cpu()
        if self._has_bias:
            queries = torch.cat([queries, torch.ones_like(queries[:, :1])], dim=-1)
        ids, distances = self._index.knn_query(queries.numpy(), k=self._candidates, num_threads=self._threads)
        logits = hidden.new_full((len(hidden), self._vocab_size), -torch.inf)
        found = (1 - torch.from_numpy(distances)).to(hidden.dtype)
        return logits.scatter_(1, torch.from_numpy(ids.astype("int64")).to(logits.device), found.to(logits.device))
