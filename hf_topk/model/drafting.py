"""Drafts blocks of tokens with the sparse head, and verifies each with the dense head in one product.

See [`lossless`], which serves what is made here.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .cache_rollback import RollBack
from .head import TopKExpertsHead
from .logits_processors import SHARED_PROCESSORS

MOST_POSITIONS = 128  # of all rows, in a block: with more the dense product is no longer bound by the bytes it reads
# A draft is doubtful if more of the probability lies outside of what was scored: such drafts are wrong more often than
# others, and what is drafted after a wrong one is lost.
DOUBTFUL_SHARE = 0.6


@dataclass
class Block:
    """Positions that were verified together.

    Attributes:
        outputs: what the model returned at each position.
        guesses: the tokens drafted after each position but the last, [B] each.
        dense: the dense logits as they left the model, [B, n, V].
    """

    outputs: list[Any] = field(default_factory=list)
    guesses: list[Tensor] = field(default_factory=list)
    dense: Tensor = field(default_factory=lambda: torch.empty(0))


class DraftingHead:
    """Makes the logits while a block is drafted: sparse ones for each guess, and at last the dense ones of all.

    Attributes:
        size: positions in the block, at most.
        guess: the next token if no processor is asked, [B]; the logits say nothing of it then.
        ended: rows that have ended, [B] bool: nothing that is drafted for them is doubtful.
        has_verified: whether the last logits were the dense ones of the whole block.
    """

    def __init__(self, head: TopKExpertsHead, size: int, is_greedy: bool) -> None:
        """Start a block.

        Args:
            head: the head to stand in for.
            size: positions in the block, at most.
            is_greedy: whether a guess is the argmax of the logits and nothing else is looked at.
        """
        self._head = head
        self._is_greedy = is_greedy
        self._states: list[Tensor] = []
        self.size = size
        self.guess: Tensor | None = None
        self.ended: Tensor | None = None
        self.has_verified = False

    @property
    def drafted(self) -> int:
        """Positions seen so far."""
        return len(self._states)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits for the next guess, [B, 1, V]; at the last position the dense logits of the whole block, [B, n, V].

        Args:
            hidden: the state that enters the head, [B, 1, d].
        """
        self._states.append(hidden)
        if len(self._states) < self.size:
            scored = self._head.score(hidden.flatten(0, 1))
            outside = self._head.share_outside(scored)
            if self.ended is not None:
                outside = outside.masked_fill(self.ended.to(outside.device), 0)
            if outside.amax() <= DOUBTFUL_SHARE:
                if self._is_greedy:
                    self.guess = self._head.best_scored(scored)
                    return hidden.new_empty(len(hidden), 1, self._head.out_features)
                return self._head.logits_of(scored).view(*hidden.shape[:-1], -1)
        self.has_verified = True
        return self._head.dense_logits(torch.cat(self._states, dim=1))


class Drafter:
    """Drafts blocks: guesses tokens as the sampling loop would choose them, with the same noise."""

    def __init__(
        self,
        model: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> None:
        """Prepare for one generation.

        Args:
            model: a converted model.
            logits_processor: of the sampling loop.
            stopping_criteria: of the sampling loop.
            generation_config: of the sampling loop.
        """
        self._model = model
        self._processor = LogitsProcessorList(one for one in logits_processor if type(one) in SHARED_PROCESSORS)
        self._does_sample = bool(generation_config.do_sample)
        self._max_length = stopping_criteria.max_length
        config = model.config.get_text_config()
        self._max_positions = getattr(config, "max_position_embeddings", None)
        self._short_positions = getattr(config, "original_max_position_embeddings", None)
        self._pad: Tensor | None = getattr(generation_config, "_pad_token_tensor", None)
        self._ends: Tensor | None = None
        ends = [one.eos_token_id for one in stopping_criteria if hasattr(one, "eos_token_id")]
        if ends and self._pad is not None:
            # The loop feeds padding to rows that have ended, for whatever reason.
            every_end = [torch.as_tensor(one, device=self._pad.device).flatten() for one in (*ends, self._pad)]
            self._ends = torch.cat(every_end)

    def longest_block(self, input_ids: Tensor, size: int, cache: RollBack) -> int:
        """How many of `size` positions can be drafted without going where dense decoding would not.

        Args:
            input_ids: the prefix, [B, T].
            size: positions that are wanted.
            cache: what the positions go to.
        """
        limits = [size, cache.room(), MOST_POSITIONS // input_ids.shape[0]]
        if self._max_length is not None:
            limits.append(self._max_length - input_ids.shape[1])
        if isinstance(self._max_positions, int):
            limits.append(self._max_positions - cache.length())
        if isinstance(self._short_positions, int) and cache.length() <= self._short_positions:
            # The step that goes beyond them may make a new cache, from which nothing could be taken back.
            limits.append(self._short_positions - cache.length())
        return max(1, min(limits))

    def draft(self, input_ids: Tensor, kwargs: dict[str, Any], size: int, cache: RollBack) -> Block:
        """Draft a block and verify it.

        Args:
            input_ids: the prefix, [B, T].
            kwargs: further arguments of the step after it; not changed.
            size: positions in the block, at most.
            cache: the cache among them.
        """
        block, head = Block(), DraftingHead(self._model.head, size, not self._does_sample and not self._processor)
        kwargs = dict(kwargs)
        next_length = kwargs.pop("next_sequence_length", None)
        cache.start_block()
        # What is drawn in here is drawn once more by the loop.
        devices = [] if input_ids.device.type == "cpu" else [input_ids.device]
        with self._model.head.replaced_by(head), torch.random.fork_rng(devices, device_type=input_ids.device.type):
            while True:
                head.ended = None if self._ends is None else torch.isin(input_ids[:, -1], self._ends)
                cache.before_step()
                inputs = self._model.prepare_inputs_for_generation(
                    input_ids, next_sequence_length=next_length, **kwargs
                )
                output = self._model(**inputs, return_dict=True)
                block.outputs.append(output)
                if head.has_verified:
                    block.dense = output.logits
                    return block
                guess = self._guess(input_ids, output.logits[:, -1], head)
                output.logits = torch.empty(0)  # sparse logits of many positions would take much memory
                block.guesses.append(guess)
                input_ids = torch.cat([input_ids, guess[:, None]], dim=-1)
                kwargs = self._model._update_model_kwargs_for_generation(
                    output, kwargs, is_encoder_decoder=self._model.config.is_encoder_decoder
                )

    def _guess(self, input_ids: Tensor, logits: Tensor, head: DraftingHead) -> Tensor:
        """The token that the loop would choose, [B], for a prefix [B, T] and logits [B, V]."""
        tokens = self._guess_from(input_ids, logits) if head.guess is None else head.guess.to(input_ids.device)
        if self._ends is None or self._pad is None or head.ended is None:
            return tokens
        tokens = torch.where(head.ended, self._pad, tokens)
        if torch.isin(tokens, self._ends).all():
            head.size = head.drafted + 1  # all rows end here
        return tokens

    def _guess_from(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """The same before it is known which rows have ended."""
        scores = self._processor(
            cast(Any, input_ids), logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        )
        if self._does_sample:
            # As `torch.multinomial` draws one, but that it refuses rows in which nothing is left.
            probabilities = scores.softmax(dim=-1)
            scores = probabilities / torch.empty_like(probabilities).exponential_()
        return scores.argmax(dim=-1)
