"""Transformers' logits processors: a faster top-p, and those that the drafter may call."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopPLogitsWarper
from transformers.generation import logits_process as processors

BINS = 1024
BINS_A_NAT = 32


class SelectingTopPLogitsWarper(TopPLogitsWarper):
    """Keeps the tokens that Transformers' `TopPLogitsWarper` keeps, and sorts only those near the threshold.

    The likeliest tokens that together have probability p (nucleus sampling, Holtzman et al. 2020,
    https://arxiv.org/abs/1904.09751) are those above some threshold. A histogram of the distances to the largest logit
    finds the bin of the threshold, and only its tokens are sorted. Accelerators, where sorting is cheap and
    synchronisation is not, sort all tokens.
    """

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Set the scores [B, V] of the tokens outside the nucleus to `filter_value`."""
        if scores.device.type != "cpu":
            return super().__call__(input_ids, scores)
        probabilities = scores.softmax(dim=-1)
        best = scores.amax(dim=-1, keepdim=True)
        depths = (best - scores).nan_to_num_(nan=0.0)  # NaN where all scores of a row are infinite
        bins = depths.mul_(BINS_A_NAT).clamp_(max=BINS - 1).long()
        mass = torch.zeros(len(scores), BINS, dtype=probabilities.dtype).scatter_add_(1, bins, probabilities)
        in_bin_or_below = mass.flip(-1).cumsum(dim=-1).flip(-1)
        # The last bin that is not removed completely; the first one never is.
        boundary = (in_bin_or_below > 1 - self.top_p).sum(dim=-1, keepdim=True).sub_(1).clamp_(min=0)
        removed = bins > boundary
        for row, edge in enumerate(boundary.squeeze(-1).tolist()):
            at_edge = (bins[row] == edge).nonzero().squeeze(-1)
            ascending = probabilities[row, at_edge].sort()
            below = in_bin_or_below[row, edge] - mass[row, edge]
            is_out = below + ascending.values.cumsum(dim=-1) <= 1 - self.top_p
            removed[row, at_edge[ascending.indices]] = is_out
        if self.min_tokens_to_keep > 1:
            best = scores.topk(min(self.min_tokens_to_keep, scores.shape[-1]), dim=-1).values[:, -1:]
        return cast(Tensor, scores).masked_fill(removed & (scores < best), self.filter_value)


def adapt(found: LogitsProcessorList) -> LogitsProcessorList:
    """Replace Transformers' logits processors by faster ones; not in lossless decoding, as rounding may differ.

    Args:
        found: the logits processors of a generation; changed.
    """
    for place, one in enumerate(found):
        if type(one) is TopPLogitsWarper:
            found[place] = SelectingTopPLogitsWarper(one.top_p, one.filter_value, one.min_tokens_to_keep)
    return found


# These depend on prefix and scores only, so the drafter can call them. All others, above all users' own, may keep state
# or run a model: they see each final prefix once. `TopHLogitsWarper` is left out: it raises where all scores of a draft
# token are -inf.
SHARED_PROCESSORS = (
    processors.EncoderNoRepeatNGramLogitsProcessor,
    processors.EncoderRepetitionPenaltyLogitsProcessor,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.ExponentialDecayLengthPenalty,
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.MinPLogitsWarper,
    processors.NoBadWordsLogitsProcessor,
    processors.NoRepeatNGramLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.SequenceBiasLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
    processors.SuppressTokensLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.WatermarkLogitsProcessor,
)
