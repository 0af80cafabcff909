"""The tokens that could be next, without logits of the whole vocabulary.

An expert that was not picked stays one mass, of which a fixed prior gives each token a share. It is expanded to tokens
only where top-k, top-p, min-p or a penalty could affect one of them, or the draw falls on it. The distribution is that
of the sparse logits.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .head import TopKExpertsHead
from .scored import Scored, log_mass, lowest_of_likeliest
from .suppression import Priors

SMALLEST_SHARE = 1e-9  # of the probability, which the likeliest token always has


class UnevenRowsError(Exception):
    """Some rows of a batch need more candidates than others: [`TokenChooser`] takes these one by one.

    Attributes:
        needs_more: which rows, [B] bool.
    """

    def __init__(self, needs_more: Tensor) -> None:
        """Name the rows."""
        super().__init__("some rows need more candidates")
        self.needs_more = needs_more


class Entries(NamedTuple):
    """What a draw can fall on: listed tokens, the other tokens of the picked experts, and the other experts as a whole.

    Attributes:
        logits: of tokens, log masses of experts, fp32 [B, n].
        weights: in proportion to the probability, fp32 [B, n].
        most: with top-p, logits of tokens, and of experts that of the likeliest token, fp32 [B, n].
        largest: of `logits`, whose weight is 1, fp32 [B, 1].
        total: the weight of all tokens that top-p chooses from, fp32 [B, 1].
    """

    logits: Tensor
    weights: Tensor
    most: Tensor
    largest: Tensor
    total: Tensor


class Candidates:
    """The tokens that could be next at some positions.

    Listed one by one are at first those with an exact logit, then all of the picked experts, then those of further
    experts. Filters list as many as they could keep.
    """

    def __init__(self, head: TopKExpertsHead, scored: Scored, priors: Priors) -> None:
        """List the tokens with an exact logit.

        Args:
            head: the sparse head.
            scored: of B positions.
            priors: of the same head; its suppressed tokens are no candidates.
        """
        self._head, self._scored, self._priors, self._temperature = head, scored, priors, 1.0
        self._ids = scored.ids  # of the listed tokens, (B, n)
        self._logits = self._masked(head.exact_once(scored), priors)  # (B, n)
        self._lists_picked = scored.screened is None  # all tokens of the picked experts
        self._experts = scored.experts  # the picked ones, and others of which all tokens are listed
        self._rest_is_removed = False
        self._top_p = 1.0  # keeps all tokens
        self._mass: Tensor | None = None  # of the tokens that top-p chose from, (B, 1); None if these are all

    @cached_property
    def _tail_scores(self) -> Tensor:
        return self._scored.tail_scores

    def penalise(self, input_ids: Tensor, penalty: float) -> None:
        """Make the tokens of a prefix [B, T] less likely (CTRL, Keskar et al. 2019, https://arxiv.org/abs/1909.05858)."""
        head = self._head
        self._list_picked()
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
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        self._logits = self._logits.scatter(1, places, penalised)

    def suppress(self, priors: Priors) -> None:
        """Suppress more tokens: those of the given experts' terms."""
        self._priors, self._logits = priors, self._masked(self._logits, priors)

    def log_mass_of(self, priors: Priors) -> Tensor:
        """Log-sum-exp of the logits of all tokens that are not suppressed in other terms, [B, 1]."""
        logits = self._masked(self._logits, priors)
        return torch.cat([logits, *self._unlisted(priors)], dim=-1).logsumexp(dim=-1, keepdim=True)

    def most_of(self, priors: Priors) -> Tensor:
        """The largest logit of the tokens that are not suppressed in other terms, [B, 1]."""
        others = (self._tail_scores + priors.best).scatter(1, self._experts, -torch.inf)
        parts = [self._masked(self._logits, priors), *self._unlisted_picked(priors), others]
        return torch.cat(parts, dim=-1).amax(dim=-1, keepdim=True)

    def apply_temperature(self, temperature: float) -> None:
        """Divide the logits by a temperature."""
        self._temperature = temperature
        self._logits = self._logits / temperature

    def keep_top_k(self, count: int) -> None:
        """Keep the likeliest tokens, and those as likely as the last of them."""
        while count > self._logits.shape[1] and self._expand_above(-math.inf):
            pass
        self._keep_above(lambda: self._logits.topk(min(count, self._logits.shape[1])).values[:, -1:])

    def keep_top_p(self, share: float) -> None:
        """Keep the likeliest tokens that together have a share of the probability; [`drawn`] rejects all others.

        Nucleus sampling, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751.
        """
        self._top_p = max(share, SMALLEST_SHARE)

    def keep_min_p(self, share: float) -> None:
        """Remove tokens whose probability is less than a share of the likeliest one's."""
        if self._top_p < 1:
            self._mass = log_mass(self._entries().logits)
        log_share = math.log(share) if share > 0 else -math.inf
        self._keep_above(lambda: self._logits.amax(dim=-1, keepdim=True) + log_share)

    def best(self) -> Tensor:
        """The likeliest token, [B]; see [`lowest_of_likeliest`]."""
        while self._expand_above(self._logits.amax(dim=-1, keepdim=True)):
            pass
        return lowest_of_likeliest(self._logits, self._ids)

    def drawn(self) -> Tensor:
        """Sample a token per row, [B]; with top-p until it is in the nucleus, so that nothing is sorted.

        Rejection sampling with a pivot, as in FlashInfer (Ye et al. 2025, https://arxiv.org/abs/2501.01005): after a
        token outside the nucleus only likelier ones are drawn.
        """
        entries = self._entries()
        tokens, logits = self._drawn_from(entries.weights, entries)
        if self._top_p == 1:
            return tokens
        are_outside, pivots = self._are_outside(logits, entries), torch.full_like(logits, -torch.inf)
        while are_outside.any():
            pivots = torch.where(are_outside, logits.maximum(pivots), pivots)
            more, logits = self._drawn_from(entries.weights.masked_fill(entries.most <= pivots, 0.0), entries)
            tokens = torch.where(are_outside.squeeze(1), more, tokens)
            are_outside &= self._are_outside(logits, entries)
        return tokens

    def _entries(self) -> Entries:
        """All that a draw can fall on."""
        parts = [self._logits] if self._rest_is_removed else [self._logits, *self._unlisted()]
        logits = most = torch.cat(parts, dim=-1)
        if self._top_p < 1 and not self._rest_is_removed:
            bounds = (self._tail_scores + self._priors.best) / self._temperature
            most = torch.cat([*parts[:-1], bounds.scatter(1, self._experts, -torch.inf)], dim=-1)
        largest = logits.amax(dim=-1, keepdim=True)
        weights = (logits - largest).exp()
        total = weights.sum(dim=-1, keepdim=True) if self._mass is None else (self._mass - largest).exp()
        return Entries(logits, weights, most, largest, total)

    def _drawn_from(self, weights: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
        """Draw by the entries' weights, [B, n]: a token per row, [B], and its logit, [B, 1]."""
        places = drawn_by(weights)
        count, logits = self._logits.shape[1], entries.logits.gather(1, places)
        tokens = self._ids.gather(1, places.clamp_max(count - 1)).squeeze(1)
        for row, place in enumerate(places.flatten().tolist()):
            if place >= count:
                tokens[row], logits[row] = self._drawn_unlisted(row, place, logits[row])
        return tokens, logits

    def _drawn_unlisted(self, row: int, place: int, logit: Tensor) -> tuple[Tensor, Tensor]:
        """Id and logit of a token that is not listed, at a row and place of the entries.

        If the entry is an expert, the token is drawn from it.
        """
        head, place = self._head, place - self._logits.shape[1]
        if not self._lists_picked:
            picked, size = self._experts[row], head.expert_size
            if place < len(picked) * size:
                return head.expert_ids[picked[place // size], place % size], logit
            place -= len(picked) * size
        logits = self._expanded(row, torch.tensor([place]))
        within = draw(logits).squeeze()
        return head.expert_ids[place, within], logits[0, within]

    def _expanded(self, row: int, experts: Tensor) -> Tensor:
        """Logits of the tokens of experts that are not listed, [m] to [m, S]."""
        scores = self._tail_scores[row, experts].unsqueeze(1)
        return (scores + self._priors.log_prior(experts)) / self._temperature

    def _are_outside(self, logits: Tensor, entries: Entries) -> Tensor:
        """Whether tokens are outside the nucleus, by their logits: [B, 1] to bool [B, 1].

        They are if likelier tokens have its share of the probability together. Experts with a likelier token are
        expanded only where their whole mass would decide.
        """
        limit = entries.total * self._top_p
        likelier = entries.weights * (entries.most > logits)
        num_tokens = entries.logits.shape[1] - (0 if self._rest_is_removed else self._head.num_experts)
        above = likelier[:, :num_tokens].sum(dim=-1, keepdim=True)
        are_outside = above >= limit
        are_unclear = ~are_outside & (likelier.sum(dim=-1, keepdim=True) >= limit)
        for row in are_unclear.flatten().nonzero().flatten().tolist():
            expanded = self._expanded(row, likelier[row, num_tokens:].nonzero().squeeze(1))
            weights = (expanded - entries.largest[row]).exp() * (expanded > logits[row])
            are_outside[row] = above[row] + weights.sum() >= limit[row]
        return are_outside

    def _unlisted(self, priors: Priors | None = None) -> list[Tensor]:
        """Logits of the picked experts' tokens that are not listed, and log masses of the other experts, [B, n] each.

        Listed tokens and experts are -inf.
        """
        priors = priors or self._priors
        masses = self._tail_scores / self._temperature + priors.mass(self._temperature)
        return [*self._unlisted_picked(priors), masses.scatter(1, self._experts, -torch.inf)]

    def _unlisted_picked(self, priors: Priors) -> list[Tensor]:
        """The first part of [`_unlisted`]; nothing if all of the picked experts' tokens are listed."""
        scored = self._scored
        if self._lists_picked or scored.places is None:
            return []
        logits = self._head.screened_logits(scored)
        if priors.is_suppressed is not None:
            logits = priors.masked(logits, self._head.expert_ids[scored.experts].flatten(1))
        return [logits.scatter(1, scored.places, -torch.inf) / self._temperature]

    def _masked(self, logits: Tensor, priors: Priors) -> Tensor:
        """The listed candidates' logits, [B, n], with those of suppressed tokens -inf."""
        return priors.masked(logits, self._ids)

    def _expand_above(self, logit: Tensor | float) -> bool:
        """List more tokens if some of them are above a logit, [B, 1]; return whether it has.

        First the tokens of the picked experts: they may raise the logit that the caller looks for.
        """
        if self._rest_is_removed:
            return False
        if isinstance(logit, Tensor) and not self._needs_more(logit).any():
            return False
        return self._list_picked() or self._expand(self._tail_scores + self._priors.best > logit * self._temperature)

    def _needs_more(self, logit: Tensor) -> Tensor:
        """Whether tokens that are not listed could be above a logit, [B, 1] to [B] bool."""
        most = self._scored.most_left
        above = torch.ones_like(logit, dtype=torch.bool) if most is None else logit < most / self._temperature
        return above.squeeze(1)

    def _check_rows_agree(self, logit: Tensor) -> None:
        """Raise an UnevenRowsError if only some rows need more than the exact logits above a logit, [B, 1]."""
        if len(logit) > 1 and not self._lists_picked and not self._rest_is_removed:
            needs_more = self._needs_more(logit)
            if needs_more.any() and not needs_more.all():
                raise UnevenRowsError(needs_more)

    def _list_picked(self) -> bool:
        """List all tokens of the picked experts; return whether some were not listed."""
        if self._lists_picked:
            return False
        self._lists_picked, self._ids = True, self._head.scored_ids(self._experts)
        self._logits = self._masked(self._head.candidate_logits(self._scored), self._priors) / self._temperature
        return True

    def _expand(self, are_wanted: Tensor) -> bool:
        """List the wanted experts, bool [B, M], and more to fill up rows; return whether there were any."""
        are_wanted = are_wanted.scatter(1, self._experts, False)
        count = int(are_wanted.sum(dim=-1).amax())
        if count == 0:
            return False
        order = are_wanted.int().scatter(1, self._experts, -1)
        more = order.topk(count, dim=-1).indices  # (B, count)
        scores = self._tail_scores.gather(1, more).unsqueeze(-1)
        logits = (scores + self._priors.log_prior(more)).flatten(1) / self._temperature
        self._logits = torch.cat([self._logits, logits], dim=-1)
        self._ids = torch.cat([self._ids, self._head.expert_ids[more].flatten(1)], dim=-1)
        self._experts = torch.cat([self._experts, more], dim=-1)
        return True

    def _keep_above(self, find: Callable[[], Tensor]) -> None:
        """Keep candidates from a logit on, [B, 1], that depends on those that are listed."""
        least = find()
        self._check_rows_agree(least)
        while self._expand_above(least):
            least = find()
        count = int((self._logits >= least).sum(dim=-1).amax())
        self._keep(least, *self._logits.topk(count))

    def _keep(self, least: Tensor, likeliest: Tensor, places: Tensor) -> None:
        """Of the likeliest candidates' logits and places, [B, n], keep those from a logit on, [B, 1], and no others."""
        self._logits, self._rest_is_removed = likeliest.masked_fill(likeliest < least, -math.inf), True
        self._ids = self._ids.gather(1, places)


def draw(logits: Tensor) -> Tensor:
    """Draw an index per row from the softmax of logits: fp32 [B, n] to [B, 1]."""
    return drawn_by((logits - logits.amax(dim=-1, keepdim=True)).exp())


def drawn_by(weights: Tensor) -> Tensor:
    """Draw an index per row in proportion to weights: fp32 [B, n] to [B, 1].

    By inversion of the cumulative distribution, which is several times as fast as `torch.multinomial` on a CPU.
    """
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.searchsorted(sums, torch.rand_like(sums[:, :1]) * sums[:, -1:], right=True)
    return drawn.clamp_max(weights.shape[1] - 1)
