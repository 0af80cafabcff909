"""Our own implementation of FlashHead, as a baseline.

Tranheden et al. 2026, "FlashHead: Efficient Drop-In Replacement for the Classification Head in Language Model
Inference" (https://arxiv.org/abs/2603.14591): the rows of the head are clustered on the unit sphere into clusters of
equal size, the unit-norm centroids are scored against the hidden state, the best p of them are probed, and the next
token is the argmax of the exact logits of the tokens in them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.errors import InputError
from ..model.kernels import expert_dot

CLUSTER_SIZE = 16
CLUSTERS_PER_PROBE = 16


class FlashHead:
    """A head that probes clusters of tokens.

    Attributes:
        weight: W of the dense head, [V, d].
        bias: of the dense head, [V] or None.
        cluster_ids: token ids of each cluster, [c, S] int64; padding repeats the first id.
        centroids: mean direction of each cluster's rows, of norm 1, in the dtype of the weight, [c, d].
        num_probes: p, clusters whose tokens are scored per position.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, cluster_ids: Tensor, num_probes: int | None = None) -> None:
        """Compute the centroids of given clusters.

        Args:
            weight: W, [V, d].
            bias: [V] or None.
            cluster_ids: [c, S] int64; every token is in one cluster, with tokens of similar direction.
            num_probes: p; None for a sixteenth of the clusters.

        Raises:
            InputError: when p exceeds the number of clusters.
        """
        num_clusters = cluster_ids.shape[0]
        if num_probes is not None and not 1 <= num_probes <= num_clusters:
            raise InputError(f"num_probes is {num_probes}, must be from 1 to the {num_clusters} clusters")
        self.weight, self.bias, self.cluster_ids = weight, bias, cluster_ids
        self.num_probes = num_probes or max(1, num_clusters // CLUSTERS_PER_PROBE)
        directions = F.normalize(weight.float(), dim=-1)
        is_own = cluster_ids != cluster_ids[:, :1]
        is_own[:, 0] = True  # further copies of the first id are padding
        sums = torch.stack([directions[ids[own]].sum(dim=0) for ids, own in zip(cluster_ids, is_own, strict=True)])
        self.centroids = F.normalize(sums, dim=-1).to(weight.dtype)

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores of the clusters: hidden [N, d] to [N, c], in the dtype of the weight."""
        return F.linear(hidden.to(self.centroids), self.centroids)

    def probe(self, hidden: Tensor) -> Tensor:
        """The clusters to probe, best first: hidden [N, d] to [N, p] int64."""
        return self.scores(hidden).topk(self.num_probes, dim=-1).indices

    def next_tokens(self, hidden: Tensor) -> Tensor:
        """The argmax over the tokens of the probed clusters: hidden [N, d] to token ids, [N] int64."""
        probed = self.probe(hidden)
        hidden, nothing = hidden.to(self.weight), probed.new_empty(0)
        _, logits = expert_dot(hidden, self.weight, self.bias, nothing, self.cluster_ids, probed)
        return self.cluster_ids[probed].flatten(1).gather(1, logits.flatten(1).argmax(dim=-1, keepdim=True)).squeeze(-1)

    def bytes_read(self) -> int:
        """Bytes of centroids and rows of the head read per position."""
        row = self.weight[:1].nbytes + (0 if self.bias is None else self.bias[:1].nbytes)
        return self.centroids.nbytes + self.num_probes * self.cluster_ids.shape[1] * row
