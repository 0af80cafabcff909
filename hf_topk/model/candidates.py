"""The tokens that could be next, without logits of the whole vocabulary.

An expert that was not picked stays one mass, of which a fixed prior gives each token a share. It is expanded to tokens
only where top-k, top-p, min-p or a penalty could affect one of them, or the draw falls on it. The distribution is that
of the sparse logits.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .draws import drawn_by
from .head import TopKExpertsHead
from .scored import Scored, lowest_of_likeliest
from .suppression import Priors

SMALLEST_SHARE = 1e-9  # of the probability, which the likeliest token always has
SAME = 1 + 1e-6  # up to this factor the weights of tokens are equal but for rounding


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
    """All that a draw can fall on.

    Attributes:
        weights: in proportion to the probability, of the listed tokens; unless the rest is removed, then of the picked
            experts' tokens that are not listed, and of all M experts, 0 if they are listed; fp32 [B, n].
        total: the sums of the weights, [B, 1].
        largest: the logit of weight 1, less the offset, [B, 1].
    """

    weights: Tensor
    total: Tensor
    largest: Tensor


class Candidates:
    """The tokens that could be next at some positions.

    Listed one by one are at first those with an exact logit, then all of the picked experts, then those of further
    experts. Top-k and min-p list as many as they could keep; top-p rejects draws.
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
        self._mass: Tensor | None = None  # log mass of what top-p chose from, less the offset, (B, 1); None if all

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
        """Log mass of all tokens that are not suppressed in other terms, less the offset, [B, 1]."""
        return torch.cat([self._listed(priors), *self._unlisted(priors)], dim=-1).logsumexp(dim=-1, keepdim=True)

    def most_of(self, priors: Priors) -> Tensor:
        """The largest logit of the tokens that are not suppressed in other terms, less the offset, [B, 1]."""
        others = (self._scored.scores + priors.best).scatter(1, self._experts, -torch.inf)
        parts = [self._listed(priors), *self._unlisted_picked(priors), others]
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

        Of equally likely tokens at the edge all are kept.

        Nucleus sampling, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751.
        """
        self._top_p = max(share, SMALLEST_SHARE)

    def keep_min_p(self, share: float) -> None:
        """Remove tokens whose probability is less than a share of the likeliest one's."""
        if share <= 0:
            return
        if self._top_p < 1:
            entries = self._entries()
            self._mass = entries.total.log() + entries.largest
        self._keep_above(lambda: self._logits.amax(dim=-1, keepdim=True) + math.log(share))

    def best(self) -> Tensor:
        """The likeliest token, [B]; see [`lowest_of_likeliest`]."""
        while self._expand_above(self._logits.amax(dim=-1, keepdim=True)):
            pass
        return lowest_of_likeliest(self._logits, self._ids)

    def drawn(self) -> Tensor:
        """Sample a token per row, [B]; with top-p until it is in the nucleus, so that nothing is sorted.

        Rejection sampling with a pivot, as in FlashInfer (Ye et al. 2025, https://arxiv.org/abs/2501.01005): after a
        token outside the nucleus only tokens that are likelier, and experts that have such, are drawn.
        """
        entries = self._entries()
        rows = list(range(len(entries.weights)))
        tokens, weights = self._drawn_from(entries, rows)
        pivots = torch.zeros_like(weights)
        while self._top_p < 1:
            are_outside = self._are_outside(weights, entries, rows)
            rows = [row for row in rows if are_outside[row]]
            if not rows:
                break
            pivots[rows] = weights[rows].maximum(pivots[rows])
            more, weights = self._drawn_from(self._likelier(entries, pivots), rows)
            tokens[rows] = more[rows]
        return tokens

    def _entries(self) -> Entries:
        parts = [self._listed(self._priors), *([] if self._rest_is_removed else self._unlisted(self._priors))]
        logits = torch.cat(parts, dim=-1)
        largest = logits.amax(dim=-1, keepdim=True)
        weights = logits.sub_(largest).exp_()
        return Entries(weights, weights.sum(dim=-1, keepdim=True), largest)

    def _drawn_from(self, entries: Entries, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Draw a token for some rows: ids, [B], and weights, [B, 1], which have no meaning in the other rows."""
        count = self._ids.shape[1]
        places = drawn_by(entries.weights, count, entries.total)
        tokens = self._ids.gather(1, places.clamp_max(count - 1)).squeeze(1)
        weights = entries.weights.gather(1, places)
        for row in rows:
            if (place := int(places[row])) >= count:
                tokens[row], weights[row] = self._drawn_unlisted(row, place, entries, weights[row])
        return tokens, weights

    def _drawn_unlisted(self, row: int, place: int, entries: Entries, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Id and weight of a token that is not listed, for a place in a row; if that is an expert, drawn from it."""
        expert_ids, size = self._head.expert_ids, self._head.expert_size
        expert = place - entries.weights.shape[1] + len(expert_ids)
        if expert < 0:
            picked, within = divmod(place - self._ids.shape[1], size)
            return expert_ids[self._experts[row, picked], within], weight
        expanded = self._expanded(row, torch.tensor([expert]), entries)
        within = int(drawn_by(expanded))
        return expert_ids[expert, within], expanded[0, within]

    def _expanded(self, row: int, experts: Tensor, entries: Entries) -> Tensor:
        """Weights of the tokens of experts that are not listed: [m] to [m, S]."""
        logits = self._scored.scores[row, experts].unsqueeze(1) + self._priors.log_prior(experts)
        return logits.div_(self._temperature).sub_(entries.largest[row]).exp_()

    def _likelier(self, entries: Entries, weights: Tensor) -> Entries:
        """Only entries with tokens that are likelier than those of some weights, [B, 1]."""
        are_likelier = entries.weights > weights * SAME
        if not self._rest_is_removed:
            are_likelier[:, -self._head.num_experts :] = self._have_likelier(weights, entries)
        likelier = entries.weights * are_likelier
        return Entries(likelier, likelier.sum(dim=-1, keepdim=True), entries.largest)

    def _have_likelier(self, weights: Tensor, entries: Entries) -> Tensor:
        """Which experts would have a token that is likelier than those of some weights, [B, 1] to [B, M]."""
        logits = (weights.log() + entries.largest) * self._temperature
        return self._scored.scores + self._priors.best > logits

    def _are_outside(self, weights: Tensor, entries: Entries, rows: list[int]) -> Tensor:
        """Whether the tokens of some rows are outside the nucleus, by their weights: [B, 1] to bool [B, 1].

        They are if likelier tokens have its share of the probability together. Experts with a likelier token are
        expanded only where their whole weight would decide.
        """
        total = entries.total if self._mass is None else (self._mass - entries.largest).exp()
        limit = total * self._top_p
        least, num_listed = weights * SAME, self._ids.shape[1]
        if self._rest_is_removed or self._are_above_the_rest(weights, entries, rows):
            return weight_above(least, entries.weights[:, :num_listed]) >= limit
        of_tokens, of_experts = entries.weights.tensor_split([-self._head.num_experts], dim=-1)
        above, likelier = weight_above(least, of_tokens), of_experts * self._have_likelier(weights, entries)
        are_unclear = (above < limit) & (above + likelier.sum(dim=-1, keepdim=True) >= limit)
        for row in (row for row in rows if are_unclear[row]):
            expanded = self._expanded(row, likelier[row].nonzero().squeeze(1), entries)
            above[row] += weight_above(least[row], expanded.flatten())
        return above >= limit

    def _are_above_the_rest(self, weights: Tensor, entries: Entries, rows: list[int]) -> bool:
        """Whether a quick test shows that in some rows no unlisted token is likelier than that of a weight."""
        if self._scored.kept is None:
            return False
        by_row = list(zip(weights.tolist(), entries.largest.tolist(), self._scored.most_left_by_row(), strict=True))
        return all(
            weight > 0 and math.log(weight) + largest >= most / self._temperature
            for (weight,), (largest,), most in map(by_row.__getitem__, rows)
        )

    def _listed(self, priors: Priors) -> Tensor:
        """Logits of the listed tokens, less the offset, [B, n]."""
        logits = self._logits if priors is self._priors else self._masked(self._logits, priors)
        return logits - self._scored.offset / self._temperature

    def _unlisted(self, priors: Priors) -> list[Tensor]:
        """Logits of the picked experts' tokens that are not listed, and log masses of the other experts, [B, n] each.

        All are less the offset. Listed tokens and experts are -inf.
        """
        masses = torch.add(priors.mass(self._temperature), self._scored.scores, alpha=1 / self._temperature)
        return [*self._unlisted_picked(priors), masses.scatter_(1, self._experts, -torch.inf)]

    def _unlisted_picked(self, priors: Priors) -> list[Tensor]:
        """The first part of [`_unlisted`]; nothing if all of the picked experts' tokens are listed."""
        scored = self._scored
        if self._lists_picked or scored.places is None:
            return []
        estimates = self._head.estimates(scored)
        if priors.is_suppressed is not None:
            estimates = priors.masked(estimates, self._head.expert_ids[scored.experts].flatten(1))
        return [estimates.scatter_(1, scored.places, -torch.inf).mul_(1 / self._temperature)]

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
        head, scored = self._head, self._scored
        always, routed = head.exact_once(scored).tensor_split([head.num_always_on], dim=-1)
        estimates = head.estimates(scored) + scored.offset
        logits = torch.cat([always, estimates.scatter_(1, cast(Tensor, scored.places), routed)], dim=-1)
        self._logits = self._masked(logits, self._priors) / self._temperature
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


def weight_above(least: Tensor, weights: Tensor) -> Tensor:
    """The sum of the weights above a limit: [..., 1] and [..., n] to [..., 1]."""
    return (weights * (weights > least)).sum(dim=-1, keepdim=True)
