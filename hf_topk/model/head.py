"""The output head of a converted model: route, gather, tail, scatter."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn

from .combiner import LearnedCombiner
from .configuration_topk_experts import TopKExpertsConfig
from .crossover import is_faster
from .head_layout import LaidOutHead, check_sizes
from .kernels import always_and_gather_dot, expert_dot
from .router import Router
from .scored import Picked, Scored
from .tail import Tail
from .whole_head import check_whole, full_shape

HEAD_MODES = ("auto", "sparse", "dense")
# Elements of sparse logits made at once; beyond it positions are worked off in turns. Small blocks of memory are used
# again, large ones are fetched from the system anew each time.
LOGITS_AT_ONCE = 1 << 20
# Positions whose experts' rows are gathered once for all of them, and their exact logits that are held at once.
SCORED_AT_ONCE, EXACT_LOGITS_AT_ONCE = 64, 1 << 22


class TopKExpertsHead(LaidOutHead):
    """A dense head that reads only the rows of the experts its router picks.

    It *is* the dense linear layer, weight and bias as they were, so that ties, dense decoding and training work on
    the original tensors; the experts are lists of token ids and rows are gathered where they lie.

    Attributes:
        weight: W, [V, d]; `bias`: [V] or None: the dense head's own.
        always_on_ids: token ids scored at every position, [A] int64.
        expert_ids: token ids of each expert, [M, S] int64; a short expert repeats its first id.
        router: hidden states [N, d] to scores, fp32 [N, M].
        tail: the estimate for tokens without an exact logit.
        later_bias: what the dense model adds to the logits afterwards, [1, V], as Marian does; None if nothing.
        config: the model's; what can be changed is read from it at each call.
        stored_type: the number type that it is stored in, which bytes are counted in; it may compute in a larger one.
    """

    def __init__(self, dense: nn.Linear, config: TopKExpertsConfig) -> None:
        """Take over a dense head.

        Args:
            dense: the dense head; its weight and bias are shared, not copied.
            config: the converted model's configuration; it is kept.

        Raises:
            InputError: when its experts and always-on tokens are not enough for the vocabulary.
        """
        vocab_size, hidden_size = full_shape(dense.weight)
        check_sizes(config, vocab_size)
        super().__init__(hidden_size, vocab_size, bias=False, device="meta")
        self.weight, self.bias = dense.weight, dense.bias
        self.later_bias: Tensor | None = None
        self.config, self.combine = config, config.combine
        num_experts, expert_size = config.num_experts, config.expert_size
        self.register_buffer("always_on_ids", torch.empty(config.num_always_on, dtype=torch.long))
        self.register_buffer("expert_ids", torch.empty(num_experts, expert_size, dtype=torch.long))
        self.router = Router(hidden_size, num_experts, config.router_rank, config.router_packed).requires_grad_(False)
        self.tail = Tail(hidden_size, num_experts, expert_size, config.tail_rank)
        if config.combine == "learned":
            self.combiner = LearnedCombiner(num_experts).requires_grad_(False)
        self._stand_ins: dict[int, Callable[[Tensor], Tensor]] = {}
        self._reset_ids()

    def reset_additions(self) -> None:
        """Freeze what conversion adds, and set what was not loaded to experts of neighbouring ids, all scored alike."""
        self._reset_ids()
        for added in self.children():
            cast(Any, added).requires_grad_(False).reset_parameters()

    def runs_sparse(self, num_positions: int, run: Callable[[Tensor], Any] | None = None) -> bool:
        """Whether a call on so many positions takes the sparse path under the present head mode.

        Args:
            num_positions: N.
            run: what it would run then; `sparse_logits` unless given.
        """
        if self.head_mode != "auto":
            return self.head_mode == "sparse"
        if torch.is_grad_enabled():
            return False
        if self.sparse_max_positions is not None:
            return num_positions <= self.sparse_max_positions
        run = run or self.sparse_logits
        sizes = (run.__name__, self.num_experts, self.num_experts_per_tok, self.num_rescored, self.combine)
        return is_faster(run, self.dense_logits, self, num_positions, *sizes)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of every token: hidden [..., d] to [..., V], in the type of `hidden`."""
        # Compiled code has none: what replaces the head keeps compiled code from running, or can do without.
        if not torch.compiler.is_compiling() and (stand_in := self.stand_in) is not None:
            return stand_in(hidden)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """The same, whatever stands in for the head."""
        flat = hidden.reshape(-1, self.in_features)
        if not self.runs_sparse(flat.shape[0]):
            return self.dense_logits(hidden)
        return self.sparse_logits(flat).view(*hidden.shape[:-1], self.out_features)

    @contextmanager
    def replaced_by(self, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """For a while, and in this thread alone, let something else make the logits, whatever the head mode.

        Args:
            stand_in: from hidden states [..., d] to logits [..., V].
        """
        thread = get_ident()
        before = self._stand_ins.get(thread)
        self._stand_ins[thread] = stand_in
        try:
            yield
        finally:
            if before is None:
                del self._stand_ins[thread]
            else:
                self._stand_ins[thread] = before

    @property
    def stand_in(self) -> Callable[[Tensor], Tensor] | None:
        """What makes the logits in this thread in place of the head, if anything does."""
        return self._stand_ins.get(get_ident()) if self._stand_ins else None

    def dense_logits(self, hidden: Tensor) -> Tensor:
        """The dense head, whatever the head mode: hidden [..., d] to [..., V]."""
        if self.weight.dim() != 2:  # else it may be a part that is put together with those of other processes
            check_whole(self)
        return super().forward(hidden)

    @property
    def full_bias(self) -> Tensor | None:
        """What a token's logit has in the end beside its row's product, [V]: by this tokens are compared."""
        if self.later_bias is None:
            return self.bias
        later = self.later_bias[0]
        return later if self.bias is None else self.bias + later

    def sparse_logits(self, hidden: Tensor) -> Tensor:
        """Exact logits for the tokens that are scored, the tail for all others.

        Args:
            hidden: hidden states, [N, d].

        Returns:
            Logits, [N, V], in the type of `hidden`.
        """
        at_once = max(1, LOGITS_AT_ONCE // self.out_features)
        if hidden.shape[0] <= at_once:
            return self.logits_of(self.score(hidden))
        # Many positions are scored at once, since they have rows in common, and the logits of a few are made at once.
        parts, exact = [], self.num_always_on + self.num_experts_per_tok * self.expert_size
        for some in hidden.split(max(at_once, min(SCORED_AT_ONCE, EXACT_LOGITS_AT_ONCE // exact))):
            scored = self.score(some)
            parts += [self.logits_of(scored.part(slice(i, i + at_once))) for i in range(0, len(some), at_once)]
        return torch.cat(parts)

    def share_outside(self, scored: Scored) -> Tensor:
        """How unsure the router is that the next token is among those that were scored.

        Args:
            scored: what was scored at N positions.

        Returns:
            The share of the probability that lies outside of the picked experts and the always-on tokens, fp32 [N].
        """
        outside = scored.scores.scatter(1, scored.experts, -torch.inf).logsumexp(dim=-1) + scored.offset.squeeze(1)
        inside = scored.masses.logsumexp(dim=-1, keepdim=True) + (0 if scored.screened is None else scored.offset)
        inside = torch.cat([scored.always.float(), inside], dim=-1).logsumexp(dim=-1)
        return torch.sigmoid(outside - inside)

    def score(self, hidden: Tensor) -> Scored:
        """Route hidden states [N, d], and compute what is scored."""
        self.check_rows()
        if self.screens:
            return self._score_screened(hidden)
        scores, top, top_scores = self.pick(hidden)
        # Logits [N, A] and [N, k, S].
        always, routed = self.logits_of_experts(hidden, top)
        ids = self.expert_ids[top]
        masses = self.mask_padding(routed.float(), ids).logsumexp(dim=-1)  # (N, k)
        disagreement = top_scores - masses
        # The offset aligns the router with what was computed.
        exact, expected = torch.stack([masses, top_scores]).logsumexp(dim=-1, keepdim=True)
        offset = exact - expected
        shifts, tail_scores = self._combine(scores, top, disagreement, offset)
        if shifts is not None:
            routed, masses = (routed + shifts.unsqueeze(-1)).to(routed.dtype), masses + shifts
        logits = torch.cat([always, routed.flatten(1)], dim=-1)
        return Scored(logits, ids.flatten(1), top, tail_scores, torch.zeros_like(offset), masses)

    def _score_screened(self, hidden: Tensor) -> Scored:
        """Route, screen the tokens of the picked experts, and compute the exact logits of the R likeliest of them."""
        scores, top, top_scores = self.pick(hidden, with_level=False)
        screened = self.tail.screen(hidden, top)  # (N, k, S)
        if self.has_short_experts:  # whose repeats have a logit, but no mass
            masked = self.mask_padding(screened, self.expert_ids[top])
            total = masked.logsumexp(dim=-1, keepdim=True)
            screened, masked = screened - total, masked - total
        else:
            screened = masked = screened.log_softmax(dim=-1)
        estimates = (masked + top_scores.unsqueeze(-1)).flatten(1)
        kept, places = estimates.topk(self.num_rescored, dim=-1, sorted=False)
        ids = self.expert_ids[top].flatten(1).gather(1, places)
        logits = self.exact_logits(hidden, ids)
        exact = logits[:, self.num_always_on :].float()
        if self.has_short_experts:  # which may have too few tokens to rescore: repeats then fill up the R places
            exact = exact.masked_fill(kept.isneginf(), -torch.inf)
        # The exact logits have the mass that their estimates had, and so do the experts then.
        offset = exact.logsumexp(dim=-1, keepdim=True) - kept.logsumexp(dim=-1, keepdim=True)
        least = kept.amin(dim=-1, keepdim=True)
        return Scored(logits, ids, top, scores, offset, top_scores, screened, places, least)

    def check_rows(self) -> None:
        """Refuse to score where this process has not got all rows, with an InputError."""
        check_whole(self)

    def logits_of_experts(self, hidden: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Exact logits of the always-on tokens and of experts: [N, d] and [N, k] to [N, A] and [N, k, S]."""
        return expert_dot(hidden, self.weight, self.full_bias, self.always_on_ids, self.expert_ids, experts)

    def exact_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Exact logits of the always-on tokens and of each position's own: [N, d] and [N, R] to [N, A + R]."""
        return always_and_gather_dot(hidden, self.weight, self.full_bias, self.always_on_ids, ids)

    def tail_may_win(self, scored: Scored) -> Tensor:
        """Whether an unscored token could be the likeliest, [N] bool: none is likelier than all of its expert."""
        most_left = scored.most_left
        if most_left is None:
            most_left = scored.tail_scores.scatter(1, scored.experts, -torch.inf).amax(dim=-1, keepdim=True)
        return (most_left >= scored.exact.amax(dim=-1, keepdim=True)).squeeze(1)

    def best_scored(self, scored: Scored) -> Tensor:
        """The token with the largest exact logit, [N]; the likeliest of all unless the tail may win."""
        ids = torch.cat([self.always_on_ids.expand(len(scored.ids), -1), scored.ids], dim=-1)
        return ids.gather(1, scored.exact.argmax(dim=-1, keepdim=True)).squeeze(1)

    def logits_of(self, scored: Scored) -> Tensor:
        """The scored tokens' logits and everyone else's tail, [N, V], less what the dense model is going to add."""
        num_positions = len(scored.exact)
        logits = scored.exact.new_empty(num_positions, self.out_features)  # every token is routed or always on
        within = self._within(scored) + scored.tail_scores.unsqueeze(-1)  # (N, M, S)
        logits.scatter_(1, self.expert_ids.flatten().expand(num_positions, -1), within.flatten(1).to(logits.dtype))
        logits.index_copy_(1, self.always_on_ids, scored.always)
        logits.scatter_(1, scored.ids, scored.routed)
        return logits if self.later_bias is None else logits - self.later_bias.to(logits.dtype)

    def candidate_logits(self, scored: Scored) -> Tensor:
        """Logits of the always-on tokens and of all tokens of the picked experts, minus infinity for repeats.

        Args:
            scored: what was scored at N positions.

        Returns:
            Exact ones and estimates, fp32 [N, A + k S].
        """
        routed = scored.routed.float()
        if scored.screened is not None and scored.places is not None:
            scores = scored.tail_scores.gather(1, scored.experts).unsqueeze(-1)
            routed = (scored.screened + scores).flatten(1).scatter(1, scored.places, routed)
        if self.has_short_experts:
            by_expert = routed.view(*scored.experts.shape, self.expert_size)
            routed = self.mask_padding(by_expert, self.expert_ids[scored.experts]).flatten(1)
        return torch.cat([scored.always.float(), routed], dim=-1)

    def log_prior(self, experts: Tensor | None = None) -> Tensor:
        """Log p(v | e) of all experts or of some if they are not picked, minus infinity for repeats: fp32 [..., S]."""
        prior, ids = self.tail.log_prior, self.expert_ids
        if experts is not None:
            prior, ids = prior[experts], ids[experts]
        return self.mask_padding(prior.float(), ids)

    def pick(self, hidden: Tensor, with_level: bool = True) -> Picked:
        """Pick the experts to score for hidden states [N, d]; scores are as [`Router.forward`] has them."""
        scores = self.router(hidden, with_level)
        top_scores, top = scores.topk(self.num_experts_per_tok, dim=-1, sorted=False)
        return Picked(scores, top, top_scores)

    def _combine(
        self, scores: Tensor, top: Tensor, disagreement: Tensor, offset: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """What to add to the exact logits of each picked expert, [N, k], and the scores that the tail uses, [N, M]."""
        if self.combine == "router":
            return disagreement, scores
        if self.combine == "exact":
            return None, scores + offset
        return self.combiner(scores + offset, top, disagreement + offset)

    def _within(self, scored: Scored) -> Tensor:
        """Log p(v | e, h) of all tokens, fp32 [N or 1, M, S]."""
        prior = self.tail.log_prior.float().unsqueeze(0)
        if scored.screened is None:
            return prior
        places = scored.experts.unsqueeze(-1).expand(-1, -1, self.expert_size)
        return prior.expand(len(places), -1, -1).scatter(1, places, scored.screened)

    def as_plain(self) -> nn.Linear:
        """The dense head as a layer of its own, which shares weight and bias."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain

    def with_rows_of(self, resized: nn.Linear) -> "TopKExpertsHead":
        """A head of the same experts with the weight and bias of another layer; see [`take_over`].

        Args:
            resized: a linear layer of the same hidden size.

        Raises:
            InputError: when too few rows are left.
        """
        hook = getattr(self, "_hf_hook", None)  # of accelerate
        kept = (*self.parameters(), *self.buffers(), self.config, self._stand_ins, hook)
        head = copy.deepcopy(self, memo=cast(dict[int, Any], {id(one): one for one in kept}))
        head.take_over(resized)
        return head
