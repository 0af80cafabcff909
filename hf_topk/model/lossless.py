"""Lossless decoding: the sparse head drafts, the dense head verifies a block at once, the tokens are the dense ones.

Transformers' own sampling loop runs unchanged and is given dense logits at every step; that these were computed a block
at a time is hidden inside the forward call. A block of n positions takes n steps of the body. The head keeps the hidden
states that enter it and answers the first n - 1 with sparse logits, from which the next token is guessed as the loop
would choose it; the last step computes the dense logits of all n states in one product. The loop then draws its own
tokens from them. While they are those that were guessed, no model runs; at the first other one the cache is rolled back
and the next block starts. So processors, criteria, streamers and scores are as in dense decoding, whatever was guessed.

Sampling is no exception. Speculative decoding usually accepts a draft with probability min(1, p / q); here the guess is
made with the very noise that the loop is going to draw with, and is right where both choose the same token. Both take
the largest p(v) / noise(v), so that they mostly do; and the outcome does not depend on the drafts at all: the same seed
gives the tokens of dense decoding. ("Drafter-invariant speculative decoding", Daliri et al., arXiv 2408.07978.)
"""

from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from .cache_rollback import RollBack, why_not_rolled_back
from .head import TopKExpertsHead
from .logits_processors import SHARED_PROCESSORS

logger = logging.get_logger(__name__)

FIRST_SIZE = 8  # positions in a block, at first
LARGEST_SIZE = 16
MOST_POSITIONS = 128  # of all rows, in a block: with more the dense product is no longer bound by the bytes it reads
# A draft is doubtful if more of the probability lies outside of what was scored: such drafts are wrong more often than
# others, and what is drafted after a wrong one is lost.
DOUBTFUL_SHARE = 0.6


@dataclass
class LosslessStats:
    """What a lossless generation took. Steps, passes and drafts are of the whole batch, whose rows go on together.

    Attributes:
        tokens: new tokens of a row, of the longest one.
        body_steps: runs of the model, the one over the prompt included, which counts as one in chunks, too.
        dense_passes: runs of the dense head, the one on the prompt included.
        drafted: tokens drafted.
        accepted: drafts that were the dense model's own tokens, in every row, as were all those before it.
    """

    tokens: int = 0
    body_steps: int = 0
    dense_passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "LosslessStats") -> "LosslessStats":
        return LosslessStats(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted; 1 if there were none."""
        return self.accepted / self.drafted if self.drafted else 1.0

    @property
    def dense_passes_per_token(self) -> float:
        """Runs of the dense head for a new token: 1 in dense decoding."""
        return self.dense_passes / max(1, self.tokens)

    @property
    def body_steps_per_token(self) -> float:
        """Runs of the model for a new token: 1 in dense decoding."""
        return self.body_steps / max(1, self.tokens)


def sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    **kwargs: Any,
) -> tuple[Any, LosslessStats]:
    """Run Transformers' sampling loop on logits of the dense head that are computed a block at a time.

    Args:
        model: a converted model, whose head is dense for the present.
        input_ids: the prompt, [B, T].
        logits_processor: as the loop takes them.
        stopping_criteria: as the loop takes them.
        generation_config: as the loop takes it.
        synced_gpus: whether other processes wait for each run of the model.
        **kwargs: what else the loop takes.

    Returns:
        What the loop returns, and what it took.
    """
    drafter = Drafter(model, logits_processor, stopping_criteria, generation_config)
    view = VerifiedModel(model, drafter, synced_gpus)
    try:
        result = cast(Any, GenerationMixin)._sample(
            view,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            **kwargs,
        )
    finally:
        view.finish()
    return result, view.stats


class VerifiedModel:
    """Stands in for the model in the sampling loop: serves each step its dense logits, and drafts when there are none.

    The loop calls `prepare_inputs_for_generation`, and then the model with exactly the arguments that it returned; so
    the one finds the output of a step, and returns it as the argument that the other passes on.

    Attributes:
        stats: what it took so far.
    """

    def __init__(self, model: Any, drafter: "Drafter", synced_gpus: bool) -> None:
        """Wrap a model for one generation.

        Args:
            model: a converted model.
            drafter: makes the blocks.
            synced_gpus: whether other processes wait for each run of the model.
        """
        self._model = model
        self._drafter = drafter
        self._synced_gpus = synced_gpus
        self._cache: RollBack | None = None
        self._has_started = False
        self._block: Block | None = None
        self._size = FIRST_SIZE
        self.stats = LosslessStats(tokens=1, body_steps=1, dense_passes=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _valid_auto_compile_criteria(self, *_: Any) -> bool:
        return False  # a compiled forward would be called past this object

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Find the output of the next step; it is what this object is then called with.

        Args:
            input_ids: the prefix, [B, T].
            **kwargs: as the model takes them.
        """
        cache = kwargs.get("past_key_values")
        if not self._has_started or (self._cache is not None and not self._cache.watches(cache)):
            self._end_block()  # Phi-3 goes on with a new cache where its long positions begin
            self._start(input_ids, cache)
        self.stats.tokens += 1
        if self._cache is None:
            return {"output": self._dense_step(input_ids, kwargs)}
        if self._block is None or not self._block.goes_on_with(input_ids[:, -1]):
            self._end_block()
            size = self._drafter.longest_block(input_ids, self._size, self._cache)
            self._block = self._drafter.draft(input_ids, kwargs, size, self._cache)
            self.stats.body_steps += len(self._block.outputs)
            self.stats.dense_passes += 1
            self.stats.drafted += len(self._block.guesses)
        return {"output": self._block.serve()}

    def __call__(self, output: Any, **_: Any) -> Any:
        """Return the output that `prepare_inputs_for_generation` found."""
        return output

    def finish(self) -> None:
        """Leave the cache as dense decoding does."""
        self._end_block()

    def _start(self, input_ids: Tensor, cache: Any) -> None:
        """See, once the prompt was read, whether drafts could be taken back."""
        self._has_started, self._cache = True, None
        reason = why_not_rolled_back(cache)
        if self._synced_gpus:
            reason = "other processes wait for each of its steps"
        elif 2 * input_ids.shape[0] > MOST_POSITIONS:
            reason = f"more than {MOST_POSITIONS // 2} rows in a batch leave no room for drafts"
        elif input_ids.device.type == "mps":
            reason = "on this device Transformers looks at the cache a step late"
        if reason is None:
            self._cache = RollBack(cache)
            return
        logger.warning_once(
            f"Lossless decoding of this {type(self._model.base).__name__} verifies every token with the dense head, "
            f"which saves nothing: {reason}."
        )

    def _dense_step(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
        self.stats.body_steps += 1
        self.stats.dense_passes += 1
        return self._model(**self._model.prepare_inputs_for_generation(input_ids, **kwargs), return_dict=True)

    def _end_block(self) -> None:
        """Take from the cache what was drafted in vain, and learn from it how far to draft."""
        if self._block is None or self._cache is None:
            return
        block, self._block = self._block, None
        self._cache.back(len(block.outputs) - block.served)
        accepted = block.served - 1
        self.stats.accepted += accepted
        if accepted < len(block.guesses):
            self._size = accepted + 1
        elif len(block.outputs) == self._size:
            self._size = min(LARGEST_SIZE, 2 * self._size)


class Block:
    """Positions that are verified together; stands in for the head while they are drafted.

    Attributes:
        outputs: what the model returned at each position, with dense logits [B, 1, V] once the block is served.
        guess: the next token if no processor is asked, [B]; the logits say nothing of it then.
        guesses: the tokens drafted after each position but the last, [B] each.
        ended: rows that have ended, [B] bool: nothing that is drafted for them is doubtful.
        is_verified: whether the dense logits were computed.
        dense: the dense logits as they left the model, [B, n, V].
        served: the number of positions that were made use of.
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
        self.outputs: list[Any] = []
        self.guess: Tensor | None = None
        self.guesses: list[Tensor] = []
        self.ended: Tensor | None = None
        self.is_verified = False
        self.dense = torch.empty(0)
        self.served = 0

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
        self.is_verified = True
        return self._head.dense_logits(torch.cat(self._states, dim=1))

    def goes_on_with(self, tokens: Tensor) -> bool:
        """Whether the next position is in the block and was drafted from these tokens, [B]."""
        return self.served < len(self.outputs) and bool(tokens.equal(self.guesses[self.served - 1]))

    def serve(self) -> Any:
        """The output of the next position, with dense logits."""
        output = self.outputs[self.served]
        output.logits = self.dense[:, self.served : self.served + 1]
        self.served += 1
        return output


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
        block = Block(self._model.head, size, is_greedy=not self._does_sample and not self._processor)
        kwargs = dict(kwargs)
        next_length = kwargs.pop("next_sequence_length", None)
        cache.start_block()
        # What is drawn in here is drawn once more by the loop.
        devices = [] if input_ids.device.type == "cpu" else [input_ids.device]
        with self._model.head.replaced_by(block), torch.random.fork_rng(devices, device_type=input_ids.device.type):
            while True:
                block.ended = None if self._ends is None else torch.isin(input_ids[:, -1], self._ends)
                cache.before_step()
                inputs = self._model.prepare_inputs_for_generation(
                    input_ids, next_sequence_length=next_length, **kwargs
                )
                output = self._model(**inputs, return_dict=True)
                block.outputs.append(output)
                if block.is_verified:
                    block.dense = output.logits
                    return block
                guess = self._guess(input_ids, output.logits[:, -1], block)
                output.logits = block.dense  # sparse logits of many positions would take much memory
                block.guesses.append(guess)
                input_ids = torch.cat([input_ids, guess[:, None]], dim=-1)
                kwargs = self._model._update_model_kwargs_for_generation(output, kwargs, is_encoder_decoder=False)

    def _guess(self, input_ids: Tensor, logits: Tensor, block: Block) -> Tensor:
        """The token that the loop would choose, [B], for a prefix [B, T] and logits [B, V]."""
        tokens = self._guess_from(input_ids, logits) if block.guess is None else block.guess.to(input_ids.device)
        if self._ends is None or self._pad is None or block.ended is None:
            return tokens
        tokens = torch.where(block.ended, self._pad, tokens)
        if torch.isin(tokens, self._ends).all():
            block.size = len(block.outputs) + 1  # all rows end here
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
