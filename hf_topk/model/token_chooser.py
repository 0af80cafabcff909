"""Chooses the next token, greedily or at random, without logits of the whole vocabulary.

A step of Transformers' sampling reads the logits of all V tokens several times. Here filters and draw work on
[`Candidates`].
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as processors

from .candidates import Candidates, UnevenRowsError
from .draws import draw
from .head import TopKExpertsHead
from .logits_processors import SelectingTopPLogitsWarper
from .scored import Scored
from .suppression import SUPPRESSORS, Priors, Suppression, Timestamps

# In the order in which Transformers applies them; each is optional, and there may be several suppressors.
KINDS = (
    (processors.RepetitionPenaltyLogitsProcessor,),
    tuple(SUPPRESSORS),
    (Timestamps,),
    (processors.TemperatureLogitsWarper,),
    (processors.TopKLogitsWarper,),
    (processors.TopPLogitsWarper, SelectingTopPLogitsWarper),
    (processors.MinPLogitsWarper,),
)


class TokenChooser:
    """Replaces the head and the logits processors of one generation.

    Prefill computes the logits of all tokens. It shows whether the dense model returns them unchanged: if it caps or
    scales them, every later step computes them, too.
    """

    def __init__(self, head: TopKExpertsHead, found: Any, does_sample: bool, leaves_logits: bool | None = None) -> None:
        """Prepare for a generation that [`can_choose`] allows.

        Args:
            head: the sparse head.
            found: the generation's logits processors.
            does_sample: whether tokens are sampled.
            leaves_logits: whether the dense model returns the head's logits unchanged; None finds out in prefill.
        """
        self._head, self._processors, self._does_sample = head, found, does_sample
        self._leaves_logits = leaves_logits
        self._are_sparse: dict[int, bool] = {}  # by number of rows
        self._suppression = Suppression(head, found)
        self._changes = [one for one in found if type(one) not in SUPPRESSORS]
        self._logits = torch.empty(0)
        self._scored: Scored | None = None
        self._nothing = torch.full((1, 1, 1), -torch.inf, device=head.weight.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Replace the head: [B, T, d] to [B, T, V], all -inf if `__call__` does not need them."""
        rows = len(hidden)
        if self._leaves_logits and hidden.shape[1:-1] == (1,) and self._runs_sparse(rows):
            with torch.inference_mode():  # faster than `no_grad`
                self._scored = self._head.score(hidden.flatten(0, 1))
            return self._nothing.to(hidden.dtype).expand(rows, 1, self._head.out_features)
        logits = self._head.logits(hidden)
        if self._leaves_logits is None:
            later = self._head.later_bias
            # A copy: the dense model may change them in place.
            self._logits = logits[:, -1].clone() if later is None else logits[:, -1] + later
        return logits

    def _runs_sparse(self, rows: int) -> bool:
        """Whether the head scores tokens of a batch; asked once, as the head's settings are slow to read."""
        if rows not in self._are_sparse:
            self._are_sparse[rows] = self._head.runs_sparse(rows, self._head.score)
        return self._are_sparse[rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Replace the logits processors: give the chosen token the largest score.

        Args:
            input_ids: the prefix, [B, T].
            scores: the model's logits, fp32 [B, V]; overwritten.
        """
        scored, self._scored = self._scored, None
        if scored is not None:
            tokens = self.choose(input_ids, scored)
            return scores.scatter_(1, tokens.unsqueeze(1), 0.0)
        if self._leaves_logits is None:
            self._leaves_logits = scores.equal(self._logits.to(scores))
        scores = self._processors(input_ids, scores)
        if not self._does_sample:
            return scores
        drawn = draw(scores)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    @torch.inference_mode()  # faster than `no_grad`
    def choose(self, input_ids: Tensor, scored: Scored) -> Tensor:
        """The next token of each row.

        Args:
            input_ids: the prefix, [B, T].
            scored: of the next position of each row.

        Returns:
            Token ids, [B].
        """
        if len(scored.ids) > 1 and self._suppression.differs_by_row:
            return self._choose_in_parts(input_ids, scored, torch.arange(len(input_ids)).split(1))
        try:
            return self._choose(input_ids, scored)
        except UnevenRowsError as error:
            others, uneven = (rows.nonzero().squeeze(1) for rows in (~error.needs_more, error.needs_more))
            return self._choose_in_parts(input_ids, scored, (others, *uneven.split(1)))

    def _choose_in_parts(self, input_ids: Tensor, scored: Scored, parts: Sequence[Tensor]) -> Tensor:
        """As [`choose`], for some rows at a time, given by their numbers."""
        tokens = torch.empty(len(input_ids), dtype=torch.long)
        for rows in parts:
            tokens[rows] = self.choose(input_ids[rows], scored.part(rows))
        return tokens

    def _choose(self, input_ids: Tensor, scored: Scored) -> Tensor:
        """As [`choose`], for rows with the same suppressed tokens."""
        priors = self._suppression.priors(input_ids)
        scored = priors.masked_scores(scored)
        if not self._changes and not self._does_sample:
            return likeliest(self._head, scored, priors)
        return self._choose_among(Candidates(self._head, scored, priors), input_ids)

    def _choose_among(self, candidates: Candidates, input_ids: Tensor) -> Tensor:
        """Apply the logits processors to candidates, and choose."""
        for one in self._changes:
            if isinstance(one, processors.RepetitionPenaltyLogitsProcessor):
                candidates.penalise(input_ids, one.penalty)
            elif isinstance(one, Timestamps):
                self._prefer_timestamps(candidates, input_ids)
            elif isinstance(one, processors.TemperatureLogitsWarper):
                candidates.apply_temperature(one.temperature)
            elif isinstance(one, processors.TopKLogitsWarper):
                candidates.keep_top_k(one.top_k)
            elif isinstance(one, processors.TopPLogitsWarper):
                candidates.keep_top_p(one.top_p)
            else:
                candidates.keep_min_p(one.min_p)
        return candidates.drawn() if self._does_sample else candidates.best()

    def _prefer_timestamps(self, candidates: Candidates, input_ids: Tensor) -> None:
        """Suppress text where all timestamps together are likelier than any token of text, as Whisper does."""
        if self._suppression.compares_timestamps:
            timestamps, text = self._suppression.timestamps(input_ids), self._suppression.text(input_ids)
            if candidates.log_mass_of(timestamps) > candidates.most_of(text):
                candidates.suppress(timestamps)


def likeliest(head: TopKExpertsHead, scored: Scored, priors: Priors | None = None) -> Tensor:
    """The token of the largest sparse logit at each position, [N]."""
    best = head.best_scored(scored)
    if not scored.has_the_likeliest():
        rows = head.tail_may_win(scored).nonzero().squeeze(1)
        if len(rows):
            best[rows] = Candidates(head, scored.part(rows), priors or Priors(head)).best()
    return best


def can_choose(head: TopKExpertsHead, found: Any, generation_config: GenerationConfig) -> bool:
    """Whether a generation can do without logits of all tokens; not on accelerators, which it would synchronise with.

    Args:
        head: the sparse head.
        found: the generation's logits processors.
        generation_config: of the generation.
    """
    asks_for_logits = generation_config.output_scores or generation_config.output_logits
    is_sparse = head.head_mode != "dense" and head.num_experts_per_tok < head.num_experts
    return not asks_for_logits and is_sparse and knows(head, found)


def knows(head: TopKExpertsHead, found: Any) -> bool:
    """Whether [`TokenChooser.choose`] applies all of these logits processors.

    Args:
        head: the sparse head.
        found: the logits processors of a generation.
    """
    if head.weight.device.type != "cpu":
        return False
    kinds = [next((place for place, kind in enumerate(KINDS) if type(one) in kind), -1) for one in found]
    once = [place for place in kinds if KINDS[place] != tuple(SUPPRESSORS)]
    is_usual = all(
        getattr(one, "min_tokens_to_keep", 1) == 1
        and getattr(one, "filter_value", -math.inf) == -math.inf
        and getattr(one, "prompt_ignore_length", None) is None
        and all(len(words) == 1 for words in getattr(one, "sequence_bias", ()))
        for one in found
    )
    return is_usual and -1 not in kinds and kinds == sorted(kinds) and once == sorted(set(once))
