"""Suppressed tokens: those whose logits Transformers' processors set to -inf, whatever the logits are.

Which tokens these are depends only on the prefix. So the processors themselves are asked, on logits of zero, and only
when their answer changes: for most of them once per generation, for Whisper's timestamps after each timestamp.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as processors

from .head import TopKExpertsHead
from .scored import Scored

# What the tokens that a processor suppresses depend on, for a prefix of some length.
SUPPRESSORS: dict[type, Callable[[Any, int], object]] = {
    processors.NoBadWordsLogitsProcessor: lambda _, length: None,
    processors.MinLengthLogitsProcessor: lambda one, length: length < one.min_length,
    processors.MinNewTokensLengthLogitsProcessor: lambda one, length: (
        length < one.min_new_tokens + one.prompt_length_to_skip
    ),
    processors.ForcedBOSTokenLogitsProcessor: lambda _, length: length == 1,
    processors.ForcedEOSTokenLogitsProcessor: lambda one, length: length == one.max_length - 1,
    processors.SuppressTokensLogitsProcessor: lambda _, length: None,
    processors.SuppressTokensAtBeginLogitsProcessor: lambda one, length: length == one.begin_index,
}
Timestamps = processors.WhisperTimeStampLogitsProcessor


class Priors:
    """Terms of the experts that are not picked, without the suppressed tokens; computed at first use."""

    def __init__(self, head: TopKExpertsHead, is_suppressed: Tensor | None = None) -> None:
        """Prepare.

        Args:
            head: the sparse head.
            is_suppressed: bool [V]; None if no token is.
        """
        self._head, self.is_suppressed = head, is_suppressed
        self._masses: dict[float, Tensor] = {}

    def log_prior(self, experts: Tensor | None = None) -> Tensor:
        """Log p(v | e) as in [`TopKExpertsHead.log_prior`], -inf for suppressed tokens: fp32 [..., S]."""
        prior, ids = self._head.log_prior(experts), self._head.expert_ids
        if self.is_suppressed is None:
            return prior
        return prior.masked_fill(self.is_suppressed[ids if experts is None else ids[experts]], -torch.inf)

    @cached_property
    def best(self) -> Tensor:
        """Log p(v | e) of each expert's likeliest token, fp32 [M]."""
        return self.log_prior().amax(dim=-1)

    def mass(self, temperature: float) -> Tensor:
        """Log of the sum of each expert's prior at a temperature, fp32 [M]."""
        if temperature not in self._masses:
            self._masses[temperature] = (self.log_prior() / temperature).logsumexp(dim=-1)
        return self._masses[temperature]

    def masked(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Set the logits of suppressed tokens to -inf: logits and token ids [N, n]."""
        return logits if self.is_suppressed is None else logits.masked_fill(self.is_suppressed[ids], -torch.inf)

    def masked_scores(self, scored: Scored) -> Scored:
        """The results of the head's steps, with exact logits of -inf for suppressed tokens."""
        if self.is_suppressed is None:
            return scored
        return scored.with_exact(self.masked(scored.exact, scored.ids))


class Suppression:
    """The tokens that the logits processors of a generation suppress."""

    def __init__(self, head: TopKExpertsHead, found: Any) -> None:
        """Prepare for one generation.

        Args:
            head: the sparse head.
            found: the generation's logits processors; those of other kinds are ignored.
        """
        self._head, self._without = head, Priors(head)
        self._suppressors = [one for one in found if type(one) in SUPPRESSORS]
        self._priors: dict[object, Priors] = {}
        self._rule: Any = next((one for one in found if type(one) is Timestamps), None)
        if self._rule is not None:
            self._suppressors.append(copy.copy(self._rule))
            self._suppressors[-1]._detect_timestamp_from_logprob = False  # that depends on the logits
            ids = torch.arange(head.out_features, device=head.weight.device)
            self._is_timestamp = ids >= self._rule.timestamp_begin

    @property
    def differs_by_row(self) -> bool:
        """Whether rows of a batch can have different suppressed tokens."""
        return self._rule is not None

    @property
    def compares_timestamps(self) -> bool:
        """Whether the mass of all timestamps is compared with the likeliest token of text."""
        return self._rule is not None and bool(self._rule._detect_timestamp_from_logprob)

    def priors(self, input_ids: Tensor) -> Priors:
        """The experts' terms after a prefix.

        Args:
            input_ids: the prefix, [B, T]; of the first row if rows differ.
        """
        return self._known(input_ids, "all")

    def timestamps(self, input_ids: Tensor) -> Priors:
        """As [`priors`], with all but timestamps suppressed."""
        return self._known(input_ids, "timestamps")

    def text(self, input_ids: Tensor) -> Priors:
        """As [`priors`], with all timestamps suppressed."""
        return self._known(input_ids, "text")

    def _known(self, input_ids: Tensor, part: str) -> Priors:
        if not self._suppressors:
            return self._without
        length = input_ids.shape[-1]
        state = [SUPPRESSORS[type(one)](one, length) for one in self._suppressors if type(one) in SUPPRESSORS]
        if self._rule is not None:
            state.append(self._state_of_rule(input_ids[0].tolist(), part))
        key = (part, *state)
        if key not in self._priors:
            self._priors[key] = Priors(self._head, self._suppressed(input_ids[:1], part))
        return self._priors[key]

    def _state_of_rule(self, prefix: list[int], part: str) -> tuple[object, ...]:
        """What the tokens that the rule of timestamps suppresses depend on."""
        begin, new = self._rule.timestamp_begin, prefix[self._rule.begin_index :]
        timestamps = [token for token in new if token >= begin]
        ends_with_one = bool(timestamps) and new[-1] >= begin
        ends_with_pair = ends_with_one and (len(new) == 1 or new[-2] >= begin)
        last = timestamps[-1] if timestamps and not ends_with_pair and part != "text" else None
        return len(prefix) == self._rule.begin_index, ends_with_one, ends_with_pair, last

    def _suppressed(self, input_ids: Tensor, part: str) -> Tensor:
        scores = torch.zeros(1, self._head.out_features, device=self._head.weight.device)
        for one in self._suppressors:
            scores = one(input_ids, scores)
        is_suppressed = scores[0].isneginf()
        if part == "text":
            return is_suppressed | self._is_timestamp
        return is_suppressed | ~self._is_timestamp if part == "timestamps" else is_suppressed
