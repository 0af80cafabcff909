"""Drafts blocks of tokens with the sparse head, and verifies each with the dense head in one product.

[`lossless`] returns these blocks to the sampling loop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .cache_rollback import CroppableCache
from .certified_screen import greedy_logits_of
from .crossover import drafting_is_faster
from .head import TopKExpertsHead
from .logits_processors import SHARED_PROCESSORS
from .scored import Scored
from .token_chooser import TokenChooser, knows

MOST_POSITIONS = 128  # of all rows, in a block; with more, the dense head is compute-bound
TYPICAL_SIZE = 8  # of the blocks of real models, whose mean lengths are 7 to 12 on text
# Drafting stops where the tokens of experts that were not picked are together so many times as likely as the draft
# token, or in sampling as all others, times the forward passes of the decoder that the dense head costs: such draft
# tokens are often rejected, and the passes that follow are lost.
DOUBT_A_PASS = 2.0

Choose = Callable[[Tensor, Scored], Tensor]  # from a prefix, [B, T], and the scored next position to token ids, [B]
Verify = Callable[[Tensor], Tensor]  # from hidden states, [..., d], to logits to choose from, [..., V]


def verification(head: TopKExpertsHead, found: LogitsProcessorList, generation_config: GenerationConfig) -> Verify:
    """What computes the logits of a verification pass: in greedy decoding without processors only the largest counts.

    Args:
        head: the sparse head.
        found: the logits processors of the generation.
        generation_config: of the generation.
    """
    asks_for_logits = generation_config.output_scores or generation_config.output_logits
    only_largest = not (generation_config.do_sample or found or asks_for_logits or head.logits_are_changed)
    return greedy_logits_of(head) if only_largest and head.head_mode != "dense" else head.fastest_dense_logits


def drafting_pays(head: TopKExpertsHead, rows: int, verify: Verify) -> bool:
    """Whether lossless decoding drafts; not in head mode "auto" if dense decoding is as fast.

    Args:
        head: the sparse head.
        rows: of the batch.
        verify: runs a verification pass.
    """
    if head.head_mode != "auto" or head.sparse_max_positions is not None:
        return head.head_mode != "dense"
    block = max(1, min(TYPICAL_SIZE, MOST_POSITIONS // rows))

    def draft(states: Tensor) -> Tensor:
        return head.mass_outside(head.score(states))

    sizes = (verify == head.fastest_dense_logits, *head.sizes_of_sparse)
    return drafting_is_faster(draft, head.fastest_dense_logits, verify, head, rows, block, *sizes)


def passes_of_the_head(model: Any) -> float:
    """What the dense head costs in forward passes of the decoder, by the bytes of their weights.

    Args:
        model: a converted model.
    """
    decoder = (model.base.get_decoder() if model.config.is_encoder_decoder else None) or model.base
    others = [model.head, *(one for one in decoder.modules() if isinstance(one, nn.Embedding))]  # which is looked up
    ids_of_others = {id(tensor) for one in others for tensor in _tensors(one)}
    read = sum(tensor.nbytes for tensor in _tensors(decoder) if id(tensor) not in ids_of_others)
    return float(model.head.weight.nbytes / max(1, read))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@dataclass
class Block:
    """Positions that are verified together.

    Attributes:
        outputs: the model's output at each position.
        draft_tokens: the draft tokens after each position but the last, [B] each.
        dense: the dense logits as the model returned them, [B, n, V]; -inf for tokens that were ruled out.
    """

    outputs: list[Any] = field(default_factory=list)
    draft_tokens: list[Tensor] = field(default_factory=list)
    dense: Tensor = field(default_factory=lambda: torch.empty(0))


class DraftingHead:
    """Replaces the head while a block is drafted: sparse logits for each draft token, then dense logits of the block.

    Attributes:
        size: positions in the block, at most.
        prefix: token ids up to the position, [B, T].
        draft_token: the draft token if it was chosen without logits of all tokens, [B]; they are then not set.
        ended: rows that have ended, [B] bool; they never stop the drafting.
        has_verified: whether the last call was the verification pass.
    """

    def __init__(
        self,
        head: TopKExpertsHead,
        verify: Verify,
        size: int,
        choose: Choose | None,
        does_sample: bool,
        doubt: float,
    ) -> None:
        """Start a block.

        Args:
            head: the head to replace.
            verify: runs the verification pass.
            size: positions in the block, at most.
            choose: chooses draft tokens without logits of all tokens; None if that is not possible.
            does_sample: whether tokens are sampled.
            doubt: ratio of probabilities up to which drafting goes on; see [`DOUBT_A_PASS`].
        """
        self._head, self._verify = head, verify
        self._choose = choose
        self._does_sample = does_sample
        self._doubt = doubt
        self._states: list[Tensor] = []
        self.size = size
        self.prefix = torch.empty(0)
        self.draft_token: Tensor | None = None
        self.ended: Tensor | None = None
        self.has_verified = False

    @property
    def drafted(self) -> int:
        """Number of positions so far."""
        return len(self._states)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Sparse logits, [B, 1, V]; at the last position the dense logits of the whole block, [B, n, V].

        Args:
            hidden: hidden state, [B, 1, d].
        """
        self._states.append(hidden)
        if len(self._states) < self.size:
            with torch.inference_mode():  # faster than `no_grad`
                scored = self._head.score(hidden.flatten(0, 1))
                most = self._head.mass_inside(scored) if self._does_sample else scored.exact.amax(dim=-1)
                doubt = self._head.mass_outside(scored) - most
                if self.ended is not None:
                    doubt = doubt.masked_fill(self.ended.to(doubt.device), -torch.inf)
                is_likely = bool(doubt.amax().exp() <= self._doubt)
            if is_likely:
                if self._choose is not None:
                    self.draft_token = self._choose(self.prefix, scored)
                    return hidden.new_empty(len(hidden), 1, self._head.out_features)
                return self._head.logits_of(scored).view(*hidden.shape[:-1], -1)
        self.has_verified = True
        return self._verify(torch.cat(self._states, dim=1))


class Drafter:
    """Drafts blocks: chooses draft tokens as the sampling loop would, with the same noise.

    Attributes:
        verify: runs a verification pass; the dense head unless set.
    """

    def __init__(
        self,
        model: Any,
        call: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> None:
        """Prepare for one generation.

        Args:
            model: a converted model.
            call: runs it with its head in eager mode.
            logits_processor: of the sampling loop.
            stopping_criteria: of the sampling loop.
            generation_config: of the sampling loop.
        """
        self._model, self._call = model, call
        self.verify: Verify = model.head.fastest_dense_logits
        self._processor = LogitsProcessorList(one for one in logits_processor if type(one) in SHARED_PROCESSORS)
        self._does_sample = bool(generation_config.do_sample)
        self._choose: Choose | None = None
        if not self._does_sample and logits_processor and knows(model.head, logits_processor):
            self._choose = TokenChooser(model.head, logits_processor, does_sample=False).choose
        elif not self._does_sample and not self._processor:
            self._choose = lambda _, scored: model.head.best_scored(scored)
        self._doubt = DOUBT_A_PASS * passes_of_the_head(model)
        self._max_length = stopping_criteria.max_length
        config = model.config.get_text_config()
        self._max_positions = getattr(config, "max_position_embeddings", None)
        self._short_positions = getattr(config, "original_max_position_embeddings", None)
        self._pad: Tensor | None = getattr(generation_config, "_pad_token_tensor", None)
        self._ends: Tensor | None = None
        ends = [one.eos_token_id for one in stopping_criteria if hasattr(one, "eos_token_id")]
        if ends and self._pad is not None:
            # The loop feeds padding to rows that have ended.
            every_end = [torch.as_tensor(one, device=self._pad.device).flatten() for one in (*ends, self._pad)]
            self._ends = torch.cat(every_end)

    def longest_block(self, input_ids: Tensor, size: int, cache: CroppableCache) -> int:
        """How many of `size` positions can be drafted without exceeding the limits of dense decoding.

        Args:
            input_ids: the prefix, [B, T].
            size: positions wanted.
            cache: the KV cache to write to.
        """
        limits = [size, cache.room(), MOST_POSITIONS // input_ids.shape[0]]
        if self._max_length is not None:
            limits.append(self._max_length - input_ids.shape[1])
        if isinstance(self._max_positions, int):
            limits.append(self._max_positions - cache.length())
        if isinstance(self._short_positions, int) and cache.length() <= self._short_positions:
            # The step beyond them may start a new cache, and the old one could not be restored.
            limits.append(self._short_positions - cache.length())
        return max(1, min(limits))

    def draft(self, input_ids: Tensor, kwargs: dict[str, Any], size: int, cache: CroppableCache) -> Block:
        """Draft a block and verify it.

        Args:
            input_ids: the prefix, [B, T].
            kwargs: further arguments of the next step; not changed.
            size: positions in the block, at most.
            cache: of the KV cache in `kwargs`.
        """
        block, choices = Block(), (self._choose, self._does_sample, self._doubt)
        head = DraftingHead(self._model.head, self.verify, size, *choices)
        kwargs = dict(kwargs)
        next_length = kwargs.pop("next_sequence_length", None)
        cache.start_block()
        # The loop draws the same random numbers again.
        devices = [] if input_ids.device.type == "cpu" else [input_ids.device]
        with self._model.head.replaced_by(head), torch.random.fork_rng(devices, device_type=input_ids.device.type):
            while True:
                head.prefix = input_ids
                head.ended = None if self._ends is None else torch.isin(input_ids[:, -1], self._ends)
                cache.before_step()
                inputs = self._model.prepare_inputs_for_generation(
                    input_ids, next_sequence_length=next_length, **kwargs
                )
                output = self._call(**inputs, return_dict=True)
                block.outputs.append(output)
                if head.has_verified:
                    block.dense = output.logits
                    return block
                tokens = self._draft_tokens(input_ids, output.logits[:, -1], head)
                output.logits = torch.empty(0)  # sparse logits of many positions would take too much RAM
                block.draft_tokens.append(tokens)
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                kwargs = self._model._update_model_kwargs_for_generation(
                    output, kwargs, is_encoder_decoder=self._model.config.is_encoder_decoder
                )

    def _draft_tokens(self, input_ids: Tensor, logits: Tensor, head: DraftingHead) -> Tensor:
        """The draft tokens, [B], for a prefix [B, T] and logits [B, V]."""
        tokens = (
            self._choose_from_all(input_ids, logits)
            if head.draft_token is None
            else head.draft_token.to(input_ids.device)
        )
        if self._ends is None or self._pad is None or head.ended is None:
            return tokens
        tokens = torch.where(head.ended, self._pad, tokens)
        if torch.isin(tokens, self._ends).all():
            head.size = head.drafted + 1  # all rows have ended
        return tokens

    def _choose_from_all(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Choose draft tokens by logits processors and sampling, whether or not rows have ended."""
        scores = self._processor(
            cast(Any, input_ids), logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        )
        if self._does_sample:
            # As in `torch.multinomial`, which refuses rows whose probabilities are all 0.
            probabilities = scores.softmax(dim=-1)
            scores = probabilities / torch.empty_like(probabilities).exponential_()
        return scores.argmax(dim=-1)
