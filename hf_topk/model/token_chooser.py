"""Chooses the next token, greedily or at random, without logits of the whole vocabulary.

A step of Transformers' sampling reads the logits of all V tokens several times. Here an expert that was not picked
stays one mass, of which a fixed prior gives each token a share. It is expanded to tokens only where top-k, top-p, min-p
or a penalty could affect one of them, or the draw falls on it. The distribution is that of the sparse logits.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as processors

from .head import TopKExpertsHead
from .logits_processors import SelectingTopPLogitsWarper
from .scored import Scored, log_mass, lowest_of_likeliest
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
FIRST_TRIED = 256  # likeliest tokens to try for top-p; four times as many while their probability is too small


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
        self._suppression = Suppression(head, found)
        self._changes = [one for one in found if type(one) not in SUPPRESSORS]
        self._logits = torch.empty(0)
        self._scored: Scored | None = None
        self._nothing = torch.full((1, 1, 1), -torch.inf, device=head.weight.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Replace the head: [B, T, d] to [B, T, V], all -inf if `__call__` does not need them."""
        rows = len(hidden)
        if self._leaves_logits and hidden.shape[1:-1] == (1,) and self._head.runs_sparse(rows, self._head.score):
            self._scored = self._head.score(hidden.flatten(0, 1))
            return self._nothing.to(hidden.dtype).expand(rows, 1, self._head.out_features)
        logits = self._head.logits(hidden)
        if self._leaves_logits is None:
            later = self._head.later_bias
            # A copy: the dense model may change them in place.
            self._logits = logits[:, -1].clone() if later is None else logits[:, -1] + later
        return logits

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

    def choose(self, input_ids: Tensor, scored: Scored) -> Tensor:
        """The next token of each row.

        Args:
            input_ids: the prefix, [B, T].
            scored: of the next position of each row.

        Returns:
            Token ids, [B].
        """
        if len(scored.ids) == 1 or not self._suppression.differs_by_row:
            return self._choose(input_ids, scored)
        rows = (slice(row, row + 1) for row in range(len(input_ids)))
        return torch.cat([self._choose(input_ids[row], scored.part(row)) for row in rows])

    def _choose(self, input_ids: Tensor, scored: Scored) -> Tensor:
        """As [`choose`], for rows with the same suppressed tokens."""
        priors = self._suppression.priors(input_ids)
        scored = priors.masked_scores(scored)
        if not self._changes and not self._does_sample:
            return likeliest(self._head, scored, priors)
        candidates = Candidates(self._head, scored, priors)
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

    def _prefer_timestamps(self, candidates: "Candidates", input_ids: Tensor) -> None:
        """Suppress text where all timestamps together are likelier than any token of text, as Whisper does."""
        if self._suppression.compares_timestamps:
            timestamps, text = self._suppression.timestamps(input_ids), self._suppression.text(input_ids)
            if candidates.log_mass_of(timestamps) > candidates.most_of(text):
                candidates.suppress(timestamps)


def likeliest(head: TopKExpertsHead, scored: Scored, priors: Priors | None = None) -> Tensor:
    """The token of the largest sparse logit at each position, [N]."""
    if not scored.has_the_likeliest() and head.tail_may_win(scored).any():
        return Candidates(head, scored, priors or Priors(head)).best()
    return head.best_scored(scored)


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


class Candidates:
    """The tokens that could be next at some positions; an expert that was not picked is one mass until expanded."""

    def __init__(self, head: TopKExpertsHead, scored: Scored, priors: Priors) -> None:
        """Start with the always-on tokens and all tokens of the picked experts.

        Args:
            head: the sparse head.
            scored: of B positions.
            priors: of the same head; its suppressed tokens are no candidates.
        """
        self._head, self._scored, self._priors = head, scored, priors
        self._tail_scores, self._temperature = scored.tail_scores, 1.0
        self._experts = scored.experts  # expanded, in the order of their tokens
        self._logits = self._masked(head.candidate_logits(scored), priors)  # (B, n)
        self._places: Tensor | None = None  # of the tokens in these experts, once some were removed
        self._rest_is_removed = False

    def penalise(self, input_ids: Tensor, penalty: float) -> None:
        """Make the tokens of a prefix [B, T] less likely (CTRL, Keskar et al. 2019, https://arxiv.org/abs/1909.05858)."""
        head = self._head
        always, of_expert = head.places_of(input_ids)
        experts = of_expert.clamp_min(0) // head.expert_size
        is_seen = torch.zeros_like(self._tail_scores, dtype=torch.bool)
        is_seen.scatter_reduce_(1, experts, of_expert >= 0, "amax")
        self._expand(is_seen)
        order = torch.arange(self._experts.shape[1]).expand_as(self._experts)
        rank = torch.zeros_like(is_seen, dtype=torch.long).scatter_(1, self._experts, order)
        within = head.num_always_on + rank.gather(1, experts) * head.expert_size + of_expert % head.expert_size
        places = torch.where(of_expert >= 0, within, always)
        logits = self._logits.gather(1, places)
        self._logits.scatter_(1, places, torch.where(logits < 0, logits * penalty, logits / penalty))

    def suppress(self, priors: Priors) -> None:
        """Suppress more tokens: those of the given experts' terms."""
        self._priors, self._logits = priors, self._masked(self._logits, priors)

    def log_mass_of(self, priors: Priors) -> Tensor:
        """Log-sum-exp of the logits of all tokens that are not suppressed in other terms, [B, 1]."""
        logits = self._masked(self._logits, priors)
        return torch.cat([logits, self._masses(priors)], dim=-1).logsumexp(dim=-1, keepdim=True)

    def most_of(self, priors: Priors) -> Tensor:
        """The largest logit of the tokens that are not suppressed in other terms, [B, 1]."""
        others = (self._tail_scores + priors.best).scatter(1, self._experts, -torch.inf)
        return torch.cat([self._masked(self._logits, priors), others], dim=-1).amax(dim=-1, keepdim=True)

    def _masked(self, logits: Tensor, priors: Priors) -> Tensor:
        """The candidates' logits, [B, n], with those of suppressed tokens -inf."""
        return logits if priors.is_suppressed is None else priors.masked(logits, self._head.scored_ids(self._experts))

    def apply_temperature(self, temperature: float) -> None:
        """Divide the logits by a temperature."""
        self._temperature = temperature
        self._logits = self._logits / temperature

    def keep_top_k(self, count: int) -> None:
        """Keep the likeliest tokens, and those as likely as the last of them."""
        if count > self._logits.shape[1]:
            self._expand_above(-math.inf)
        count = min(count, self._logits.shape[1])
        least = self._logits.topk(count).values[:, -1:]
        if self._expand_above(least):
            least = self._logits.topk(count).values[:, -1:]
        self._keep_above(least)

    def keep_top_p(self, share: float) -> None:
        """Keep the likeliest tokens that together have a share of the probability.

        Nucleus sampling, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751.
        """
        least, likeliest = self._nucleus(share)
        if self._expand_above(least):
            least, likeliest = self._nucleus(share)
        self._keep(least, *likeliest)

    def _nucleus(self, share: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The likeliest candidates that have a share of the probability: the least logit of these, and the candidates.

        Returns:
            The least logit, -inf if all candidates do not have the share, [B, 1]. Logits and places of at least these
            candidates, [B, n].
        """
        total, count, length = self._log_mass(), FIRST_TRIED, self._logits.shape[1]
        while True:
            likeliest, places = self._logits.topk(min(count, length))
            probabilities = (likeliest - total).exp()
            sums = probabilities.cumsum(dim=-1)
            has_enough = sums[:, -1:] >= share
            all_have = bool(has_enough.all())
            if count >= length or all_have:
                break
            count *= 4
        least = likeliest.masked_fill(sums - probabilities >= share, math.inf).amin(dim=-1, keepdim=True)
        is_least = self._rest_is_removed or all_have
        return least if is_least else least.where(has_enough, -math.inf), (likeliest, places)

    def keep_min_p(self, share: float) -> None:
        """Remove tokens whose probability is less than a share of the likeliest one's."""
        self._expand_above(self._logits.amax(dim=-1, keepdim=True))
        least = self._logits.amax(dim=-1, keepdim=True) + (math.log(share) if share > 0 else -math.inf)
        self._expand_above(least)
        self._keep_above(least)

    def best(self) -> Tensor:
        """The likeliest token, [B]; see [`lowest_of_likeliest`]."""
        self._expand_above(self._logits.amax(dim=-1, keepdim=True))
        equals = (self._logits == self._logits.amax(dim=-1, keepdim=True)).sum(dim=-1)
        largest, places = self._logits.topk(max(1, int(equals.max())), dim=-1)
        return lowest_of_likeliest(largest, self._tokens(places))

    def drawn(self) -> Tensor:
        """Sample a token per row, [B]."""
        if self._rest_is_removed:
            return self._tokens(draw(self._logits)).squeeze(1)
        count = self._logits.shape[1]
        drawn = draw(torch.cat([self._logits, self._masses()], dim=-1))
        tokens = self._tokens(drawn.clamp_max(count - 1)).squeeze(1)
        for row in (drawn.squeeze(1) >= count).nonzero().flatten().tolist():
            expert = drawn[row] - count
            place = draw(self._priors.log_prior(expert).flatten(1) / self._temperature)
            tokens[row] = self._head.expert_ids[expert, place.squeeze(1)]
        return tokens

    def _log_mass(self) -> Tensor:
        """Log-sum-exp of the logits of all tokens, [B, 1]."""
        return log_mass(self._logits if self._rest_is_removed else torch.cat([self._logits, self._masses()], dim=-1))

    def _masses(self, priors: Priors | None = None) -> Tensor:
        """Log masses of the experts that are not expanded, -inf for the others, [B, M]."""
        scores = self._tail_scores / self._temperature + (priors or self._priors).mass(self._temperature)
        return scores.scatter(1, self._experts, -torch.inf)

    def _expand_above(self, logit: Tensor | float) -> bool:
        """Expand the experts that have a token above a logit, [B, 1]; return whether there were any."""
        if self._rest_is_removed:
            return False
        most = self._scored.most_left
        if most is not None and isinstance(logit, Tensor) and (logit >= most / self._temperature).all():
            return False
        return self._expand(self._tail_scores + self._priors.best > logit * self._temperature)

    def _expand(self, are_wanted: Tensor) -> bool:
        """Expand the wanted experts, bool [B, M], and more to fill up rows; return whether there were any."""
        are_wanted = are_wanted.scatter(1, self._experts, False)
        count = int(are_wanted.sum(dim=-1).amax())
        if count == 0:
            return False
        order = are_wanted.int().scatter(1, self._experts, -1)
        more = order.topk(count, dim=-1).indices  # (B, count)
        scores = self._tail_scores.gather(1, more).unsqueeze(-1)
        logits = (scores + self._priors.log_prior(more)).flatten(1) / self._temperature
        self._logits = torch.cat([self._logits, logits], dim=-1)
        self._experts = torch.cat([self._experts, more], dim=-1)
        return True

    def _keep_above(self, least: Tensor) -> None:
        """Remove candidates below a logit, [B, 1]."""
        count = int((self._logits >= least).sum(dim=-1).amax())
        self._keep(least, *self._logits.topk(count))

    def _keep(self, least: Tensor, likeliest: Tensor, places: Tensor) -> None:
        """Of the likeliest candidates' logits and places, [B, n], keep those from a logit on, [B, 1], and no others."""
        self._logits, self._rest_is_removed = likeliest.masked_fill(likeliest < least, -math.inf), True
        self._places = places if self._places is None else self._places.gather(1, places)

    def _tokens(self, places: Tensor) -> Tensor:
        """Token ids of places among the candidates, [B, n]."""
        head = self._head
        if self._places is not None:
            places = self._places.gather(1, places)
        of_expert = (places - head.num_always_on).clamp_min(0)
        expert = self._experts.gather(1, of_expert // head.expert_size)
        tokens = head.expert_ids[expert, of_expert % head.expert_size]
        if head.num_always_on:
            always = head.always_on_ids[places.clamp_max(head.num_always_on - 1)]
            tokens = torch.where(places < head.num_always_on, always, tokens)
        return tokens


def draw(logits: Tensor) -> Tensor:
    """Draw an index per row from the softmax of logits: fp32 [B, n] to [B, 1].

    By inversion of the cumulative distribution, which is several times as fast as `torch.multinomial` on a CPU.
    """
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.searchsorted(sums, torch.rand_like(sums[:, :1]) * sums[:, -1:], right=True)
    return drawn.clamp_max(logits.shape[1] - 1)
