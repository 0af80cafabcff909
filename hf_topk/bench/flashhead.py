"""FlashHead's method, in code of our own, to be measured beside ours.

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
CLUSTERS_A_PROBE = 16


class FlashHead:
    """A head that probes clusters of tokens.

    Attributes:
        weight: W, [V, d]; `bias`: [V] or None: the dense head's own.
        cluster_ids: token ids of each cluster, [c, S] int64; a short cluster repeats its first id.
        centroids: mean direction of each cluster's rows, of norm 1, in the type of the weight, [c, d].
        num_probes: p, clusters whose tokens are scored for a position.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, cluster_ids: Tensor, num_probes: int | None = None) -> None:
        """Fit the centroids of clusters that are given.

        Args:
            weight: W, [V, d].
            bias: [V] or None.
            cluster_ids: [c, S] int64: every token in one cluster, near directions together.
            num_probes: p; None for one in sixteen of the clusters.

        Raises:
            InputError: when there are not so many clusters.
        """
        num_clusters = cluster_ids.shape[0]
        if num_probes is not None and not 1 <= num_probes <= num_clusters:
            raise InputError(f"num_probes is {num_probes}, must be from 1 to the {num_clusters} clusters")
        self.weight, self.bias, self.cluster_ids = weight, bias, cluster_ids
        self.num_probes = num_probes or max(1, num_clusters // CLUSTERS_A_PROBE)
        directions = F.normalize(weight.float(), dim=-1)
        is_own = cluster_ids != cluster_ids[:, :1]
        is_own[:, 0] = True  # the other places of the first id only fill the cluster up
        sums = torch.stack([directions[ids[own]].sum(dim=0) for ids, own in zip(cluster_ids, is_own, strict=True)])
        self.centroids = F.normalize(sums, dim=-1).to(weight.dtype)

    def scores(self, hidden: Tensor) -> Tensor:
        """How near each cluster's direction is: hidden [N, d] to [N, c], in the type of the weight."""
        return F.linear(hidden.to(self.centroids), self.centroids)

    def probe(self, hidden: Tensor) -> Tensor:
        """The clusters to look into, best first: hidden [N, d] to [N, p] int64."""
        return self.scores(hidden).topk(self.num_probes, dim=-1).indices

    def next_tokens(self, hidden: Tensor) -> Tensor:
        """The likeliest token of those probed: hidden [N, d] to token ids, [N] int64."""
        probed = self.probe(hidden)
        hidden, nothing = hidden.to(self.weight), probed.new_empty(0)
        _, logits = expert_dot(hidden, self.weight, self.bias, nothing, self.cluster_ids, probed)
        return self.cluster_ids[probed].flatten(1).gather(1, logits.flatten(1).argmax(dim=-1, keepdim=True)).squeeze(-1)

    def bytes_read(self) -> int:
        """Bytes of centroids and rows of the head touched for one position."""
        row = self.weight[:1].nbytes + (0 if self.bias is None else self.bias[:1].nbytes)
        return self.centroids.nbytes + self.num_probes * self.cluster_ids.shape[1] * row
