"""The output head of a converted model: route, gather, tail, scatter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .combiner import LearnedCombiner
from .configuration_topk_experts import TopKExpertsConfig
from .crossover import is_faster
from .head_layout import LaidOutHead, check_sizes
from .kernels import (
    NARROW,
    WIDE,
    expert_dot,
    gather_dot_sharing,
    largest,
    linear_in_float32,
    runs_on_triton,
)
from .router import Router
from .scored import Picked, Scored, lowest_of_likeliest, mass_over
from .sharing import copy_sharing
from .tail import Tail
from .whole_head import check_whole, full_shape

HEAD_MODES = ("auto", "sparse", "dense")
# Elements of sparse logits computed at once; more positions are split into chunks. The allocator reuses small blocks of
# memory and fetches large ones from the system each time.
LOGITS_AT_ONCE = 1 << 20
MOST_TOKENS_IN_TRITON = 64  # of an expert; with more, its kernel for the screen needs too many registers
# Positions that share one gathering of their experts' rows, and exact logits held at once.
SCORED_AT_ONCE, EXACT_LOGITS_AT_ONCE = 64, 1 << 22
# Positions from which on dense products in parts can be faster, for how many it is measured, and rows to measure on.
FEWEST_IN_FLOAT32, MEASURED_IN_FLOAT32, ROWS_OF_COMPARISON = 4, 8, 4096


class TopKExpertsHead(LaidOutHead):
    """A dense head that reads only the rows of the experts its router picks.

    It *is* the dense linear layer, with unchanged weight and bias, so that ties, dense decoding and training use the
    original tensors. Experts are lists of token ids, whose rows are gathered from the weight.

    Attributes:
        weight: W, [V, d], of the dense head; `bias`: its bias, [V], or None.
        always_on_ids: token ids scored at every position, [A] int64.
        expert_ids: token ids of each expert, [M, S] int64; a short expert repeats its first id.
        router: hidden states [N, d] to scores, fp32 [N, M].
        tail: the estimate for tokens without an exact logit.
        logits_are_changed: whether the dense model, when it was last run to verify drafts, changed the head's logits.
        later_bias: the bias that the dense model adds to the logits after the head, [1, V], as in Marian; or None.
        config: the model's; settings that can change are read from it in each call.
        stored_type: the dtype on disk, for counting bytes; it may compute in a wider one.
    """

    def __init__(self, dense: nn.Linear, config: TopKExpertsConfig) -> None:
        """Wrap a dense head.

        Args:
            dense: the dense head; its weight and bias are shared, not copied.
            config: the converted model's configuration; the head keeps a reference.

        Raises:
            InputError: when its experts and always-on tokens do not cover the vocabulary.
        """
        vocab_size, hidden_size = full_shape(dense.weight)
        check_sizes(config, vocab_size)
        super().__init__(hidden_size, vocab_size, bias=False, device="meta")
        self.weight, self.bias = dense.weight, dense.bias
        self.later_bias: Tensor | None = None
        self.logits_are_changed = False
        self.config, self.combine = config, config.combine
        num_experts, expert_size = config.num_experts, config.expert_size
        self.register_buffer("always_on_ids", torch.empty(config.num_always_on, dtype=torch.long))
        self.register_buffer("expert_ids", torch.empty(num_experts, expert_size, dtype=torch.long))
        self.router = Router(hidden_size, num_experts, config.router_rank, config.router_packed).requires_grad_(False)
        self.tail = Tail(hidden_size, num_experts, expert_size, config.tail_rank)
        if config.combine == "learned":
            self.combiner = LearnedCombiner(num_experts).requires_grad_(False)
        self._replacements: dict[int, Callable[[Tensor], Tensor]] = {}
        self._reset_ids()

    def reset_additions(self) -> None:
        """Freeze the additions of conversion; those not loaded become experts of consecutive ids with equal scores."""
        self._reset_ids()
        for added in self.children():
            cast(Any, added).requires_grad_(False).reset_parameters()

    def runs_sparse(self, num_positions: int, run: Callable[[Tensor], Any] | None = None) -> bool:
        """Whether a call on N positions takes the sparse path in the current head mode.

        Args:
            num_positions: N.
            run: the sparse function to time; `sparse_logits` unless given.
        """
        if self.head_mode != "auto":
            return self.head_mode == "sparse"
        if torch.is_grad_enabled():
            return False
        if self.sparse_max_positions is not None:
            return num_positions <= self.sparse_max_positions
        run = run or self.sparse_logits
        return is_faster(run, self.fastest_dense_logits, self, num_positions, run.__name__, *self.sizes_of_sparse)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of every token: hidden [..., d] to [..., V], in the dtype of `hidden`."""
        # Compiled code is never replaced: what replaces the head either forces eager mode or is optional.
        if not torch.compiler.is_compiling() and (replacement := self.replacement) is not None:
            return replacement(hidden)
        return self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits as in [`forward`], even while the head is replaced."""
        flat = hidden.reshape(-1, self.in_features)
        if not self.runs_sparse(flat.shape[0]):
            return self.dense_logits(hidden) if self.head_mode == "dense" else self.fastest_dense_logits(hidden)
        return self.sparse_logits(flat).view(*hidden.shape[:-1], self.out_features)

    @contextmanager
    def replaced_by(self, replacement: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside the context and in this thread only, compute logits with another function, whatever the head mode.

        Args:
            replacement: from hidden states [..., d] to logits [..., V].
        """
        thread = get_ident()
        before = self._replacements.get(thread)
        self._replacements[thread] = replacement
        try:
            yield
        finally:
            if before is None:
                del self._replacements[thread]
            else:
                self._replacements[thread] = before

    @property
    def replacement(self) -> Callable[[Tensor], Tensor] | None:
        """The function that replaces the head in this thread, if any."""
        return self._replacements.get(get_ident()) if self._replacements else None

    def dense_logits(self, hidden: Tensor) -> Tensor:
        """The dense head, whatever the head mode: hidden [..., d] to [..., V]."""
        if self.weight.dim() != 2:  # a 2-d shard is valid here: the logits of the processes are put together
            check_whole(self)
        return super().forward(hidden)

    def fastest_dense_logits(self, hidden: Tensor) -> Tensor:
        """As [`dense_logits`], with other rounding where a CPU multiplies several positions faster part by part."""
        flat, dense = hidden.reshape(-1, self.in_features), self.dense_logits
        fits = self.weight.is_cpu and self.weight.itemsize <= torch.float32.itemsize
        if not fits or len(flat) < FEWEST_IN_FLOAT32 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return dense(hidden)
        if not is_faster(self._logits_in_float32, dense, self, MEASURED_IN_FLOAT32, "float32"):
            return dense(hidden)
        return self._logits_in_float32(flat).view(*hidden.shape[:-1], self.out_features)

    def _logits_in_float32(self, hidden: Tensor) -> Tensor:
        check_whole(self)
        # One part of the rows tells which number of columns is faster.
        part = self.weight[:ROWS_OF_COMPARISON]
        narrow, wide = (partial(linear_in_float32, weight=part, bias=None, fewest_columns=n) for n in (NARROW, WIDE))
        is_narrow = is_faster(narrow, wide, self, MEASURED_IN_FLOAT32, "columns")
        return linear_in_float32(hidden, self.weight, self.bias, NARROW if is_narrow else WIDE)

    @property
    def full_bias(self) -> Tensor | None:
        """Bias of the final logits, by which tokens are compared, [V]: the head's and `later_bias`; None if neither."""
        if self.later_bias is None:
            return self.bias
        later = self.later_bias[0]
        return later if self.bias is None else self.bias + later

    def sparse_logits(self, hidden: Tensor) -> Tensor:
        """Exact logits for the scored tokens, the tail for all others.

        Args:
            hidden: hidden states, [N, d].

        Returns:
            Logits, [N, V], in the dtype of `hidden`.
        """
        at_once = SCORED_AT_ONCE if self._runs_in_triton(hidden) else max(1, LOGITS_AT_ONCE // self.out_features)
        if hidden.shape[0] <= at_once:
            return self.logits_of(self.score(hidden))
        # Many positions are scored at once, as they share rows; logits are computed for a few positions at a time.
        parts, exact = [], self.num_always_on + self.num_experts_per_tok * self.expert_size
        for some in hidden.split(max(at_once, min(SCORED_AT_ONCE, EXACT_LOGITS_AT_ONCE // exact))):
            scored = self.score(some)
            parts += [self.logits_of(scored.part(slice(i, i + at_once))) for i in range(0, len(some), at_once)]
        return torch.cat(parts)

    def mass_outside(self, scored: Scored) -> Tensor:
        """The router's estimate of the log mass of the tokens of all experts that were not picked, [N]."""
        return scored.scores.scatter(1, scored.experts, -torch.inf).logsumexp(dim=-1) + scored.offset.squeeze(1)

    def mass_inside(self, scored: Scored) -> Tensor:
        """The log mass of all other tokens, [N]."""
        masses = scored.masses if scored.screened is None else scored.masses + scored.offset
        return torch.cat([scored.exact[:, : self.num_always_on].float(), masses], dim=-1).logsumexp(dim=-1)

    def score(self, hidden: Tensor) -> Scored:
        """Route hidden states [N, d], and compute the exact logits."""
        self.check_rows()
        if self.screens:
            return self._score_screened(hidden)
        scores, top, top_scores = self.pick(hidden)
        # Logits [N, A] and [N, k, S].
        always, routed = self.logits_of_experts(hidden, top)
        masses = self.mask_padding(routed.float(), self.expert_ids[top]).logsumexp(dim=-1)  # (N, k)
        disagreement = top_scores - masses
        # The offset aligns the router's scores with the exact logits.
        exact, expected = torch.stack([masses, top_scores]).logsumexp(dim=-1, keepdim=True)
        offset = exact - expected
        shifts, tail_scores = self._combine(scores, top, disagreement, offset)
        if shifts is not None:
            routed, masses = (routed + shifts.unsqueeze(-1)).to(routed.dtype), masses + shifts
        logits = torch.cat([always, routed.flatten(1)], dim=-1)
        return Scored(logits, self.scored_ids(top), top, tail_scores, masses, torch.zeros_like(offset))

    def _score_screened(self, hidden: Tensor) -> Scored:
        """Route, screen the tokens of the picked experts, and compute the exact logits of the R likeliest of them."""
        if self._runs_in_triton(hidden):
            from .triton_head import score

            return score(self, hidden)
        if len(hidden) == 1 and self.router.rows is None and not self.has_short_experts:
            return self._score_one(hidden)
        scores, top, top_scores = self.pick(hidden, with_level=False)
        screened = self.tail.screen(hidden, top)  # (N, k, S)
        token_ids = F.embedding(top, self.expert_ids)
        if has_short := self.has_short_experts:  # their repeated ids have a logit, but no mass
            masked = self.mask_padding(screened, token_ids)
            total = masked.logsumexp(dim=-1, keepdim=True)
            screened, masked = screened - total, masked - total
        else:
            screened = masked = screened.log_softmax(dim=-1)
        estimates = (masked + top_scores.unsqueeze(-1)).flatten(1)
        kept, places = largest(estimates, self.num_rescored)
        always = self.always_on_ids.expand(places.shape[0], -1)
        ids = torch.cat([always, token_ids.flatten(1).gather(1, places)], dim=-1)
        exact = self.exact_logits(hidden, ids)
        offset = None
        if has_short:
            offset = mass_over(exact[:, always.shape[1] :].masked_fill(kept.isneginf(), -torch.inf), kept)
        return Scored(exact, ids, top, scores, top_scores, offset, screened, places, kept)

    def _score_one(self, hidden: Tensor) -> Scored:
        """As [`_score_screened`], for one position, in fewer operations.

        Between two tokens the decoder's weights displace all else from the cache, also the code of operations: one that
        runs for the first time since takes some ten microseconds.
        """
        scores = self.router.products(hidden)
        top_scores, top = largest(scores, self.num_experts_per_tok)
        screened = self.tail.screen(hidden, top).log_softmax(dim=-1)
        kept, places = largest((screened + top_scores.unsqueeze(-1)).flatten(1), self.num_rescored)
        routed = self.expert_ids.index_select(0, top[0]).view(-1).index_select(0, places[0])
        ids = torch.cat([self.always_on_ids, routed]).unsqueeze(0)
        exact = self.exact_logits(hidden, ids)
        return Scored(exact, ids, top, scores, top_scores, None, screened, places, kept)

    def _runs_in_triton(self, hidden: Tensor) -> bool:
        """Whether all steps with a screen have kernels; a router of floats and its training have none."""
        if not hidden.is_cuda or self.router.rows is not None or not self.screens:
            return False
        is_narrow = self.expert_size <= MOST_TOKENS_IN_TRITON
        return is_narrow and runs_on_triton(hidden, self.weight, self.full_bias, self.router.bias)

    def check_rows(self) -> None:
        """Raise an InputError if this process does not have all rows."""
        check_whole(self)

    def logits_of_experts(self, hidden: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Exact logits of the always-on tokens and of experts: [N, d] and [N, k] to [N, A] and [N, k, S]."""
        return expert_dot(hidden, self.weight, self.full_bias, self.always_on_ids, self.expert_ids, experts)

    def exact_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Exact logits of tokens of which the first are the always-on ones: [N, d] and [N, A + R] to [N, A + R]."""
        return gather_dot_sharing(hidden, self.weight, self.full_bias, ids, self.num_always_on)

    def tail_may_win(self, scored: Scored) -> Tensor:
        """Whether an unscored token could be the likeliest, [N] bool: its probability is at most that of its expert."""
        most_left = scored.most_left
        if most_left is None:
            most_left = scored.tail_scores.scatter(1, scored.experts, -torch.inf).amax(dim=-1, keepdim=True)
        return (most_left >= scored.exact.amax(dim=-1, keepdim=True)).squeeze(1)

    def best_scored(self, scored: Scored) -> Tensor:
        """The token with the largest exact logit, [N]; the likeliest of all unless the tail may win."""
        return lowest_of_likeliest(scored.exact, scored.ids)

    def logits_of(self, scored: Scored) -> Tensor:
        """Exact logits of the scored tokens and the tail of all others, less `later_bias`, [N, V]."""
        logits = self._scattered(scored)
        return logits if self.later_bias is None else logits - self.later_bias.to(logits.dtype)

    def _scattered(self, scored: Scored) -> Tensor:
        """As [`logits_of`], with `later_bias`."""
        screened = scored.screened
        if screened is not None and runs_on_triton(scored.exact, scored.scores, scored.offset, screened):
            from .triton_head import logits_of

            return logits_of(self, scored)
        num_positions = len(scored.exact)
        logits = scored.exact.new_empty(num_positions, self.out_features)  # every token is routed or always on
        within = self._within(scored) + scored.tail_scores.unsqueeze(-1)  # (N, M, S)
        logits.scatter_(1, self.expert_ids.flatten().expand(num_positions, -1), within.flatten(1).to(logits.dtype))
        return logits.scatter_(1, scored.ids, scored.exact)

    def exact_once(self, scored: Scored) -> Tensor:
        """The exact logits of N positions, -inf for repeated ids, fp32 [N, A + k S] or [N, A + R]."""
        exact = scored.exact.float()
        if not self.has_short_experts:
            return exact
        always, routed = exact.tensor_split([self.num_always_on], dim=-1)
        if scored.kept is None:
            by_expert = routed.view(*scored.experts.shape, self.expert_size)
            routed = self.mask_padding(by_expert, self.expert_ids[scored.experts]).flatten(1)
        else:
            routed = routed.masked_fill(scored.kept.isneginf(), -torch.inf)
        return torch.cat([always, routed], dim=-1)

    def estimates(self, scored: Scored) -> Tensor:
        """Estimates of all tokens of the picked experts, less the offset, -inf for repeated ids: fp32 [N, k S]."""
        estimates = cast(Tensor, scored.screened) + scored.masses.unsqueeze(-1)
        if self.has_short_experts:
            estimates = self.mask_padding(estimates, self.expert_ids[scored.experts])
        return estimates.flatten(1)

    def log_prior(self, experts: Tensor | None = None) -> Tensor:
        """Log p(v | e) of all or some experts where they are not picked, -inf for repeated ids: fp32 [..., S]."""
        prior, ids = self.tail.log_prior, self.expert_ids
        if experts is not None:
            prior, ids = prior[experts], ids[experts]
        return self.mask_padding(prior.float(), ids)

    def pick(self, hidden: Tensor, with_level: bool = True) -> Picked:
        """Pick the experts of hidden states [N, d]; scores are those of [`Router.forward`]."""
        scores = self.router(hidden, with_level)
        top_scores, top = largest(scores, self.num_experts_per_tok)
        return Picked(scores, top, top_scores)

    def _combine(
        self, scores: Tensor, top: Tensor, disagreement: Tensor, offset: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Shifts of the exact logits of each picked expert, [N, k], and the scores for the tail, [N, M]."""
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
        """The dense head as a plain linear layer that shares weight and bias."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain

    def with_rows_of(self, resized: nn.Linear) -> "TopKExpertsHead":
        """A copy of this head with the weight and bias of another layer; see [`take_over`].

        Args:
            resized: a linear layer of the same hidden size.

        Raises:
            InputError: when too few rows are left.
        """
        hook = getattr(self, "_hf_hook", None)  # of accelerate
        head = copy_sharing(self, (*self.parameters(), *self.buffers(), self.config, self._replacements, hook))
        head.take_over(resized)
        return head
