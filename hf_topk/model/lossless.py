"""Lossless decoding: the sparse head drafts, the dense head verifies a block at once, the tokens are the dense ones.

Transformers' own sampling loop runs unchanged and is given dense logits at every step; that these were computed a block
at a time is hidden inside the forward call. A block of n positions takes n forward passes of the decoder. The head
keeps the hidden states that enter it and answers the first n - 1 with sparse logits, from which the next token is
guessed as the loop would choose it; the last step computes the dense logits of all n states in one product. The loop
then draws its own tokens from them. While they are those that were guessed, no model runs; at the first other one the
cache is rolled back and the next block starts. So processors, criteria, streamers and scores are as in dense decoding,
whatever was guessed.

Sampling is no exception. Speculative decoding usually accepts a draft with probability min(1, p / q); here the guess is
made with the very noise that the loop is going to draw with, and is right where both choose the same token. Both take
the largest p(v) / noise(v), so that they mostly do; and the outcome does not depend on the drafts at all: the same seed
gives the tokens of dense decoding. ("Drafter-invariant speculative decoding", Daliri et al., arXiv 2408.07978.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from .cache_rollback import RollBack, why_not_rolled_back
from .drafting import MOST_POSITIONS, Block, Drafter

logger = logging.get_logger(__name__)

# Whether the generation that is going on, in this thread, is to be lossless.
is_lossless_generation: ContextVar[bool] = ContextVar("is_lossless_generation", default=False)

FIRST_SIZE = 8  # positions in a block, at first
LARGEST_SIZE = 16


@dataclass
class LosslessStats:
    """What a lossless generation took. Steps, passes and drafts are of the whole batch, whose rows go on together.

    Attributes:
        tokens: new tokens of a row, of the longest one.
        forward_passes: runs of the model, the one over the prompt included, which counts as one in chunks, too.
        dense_passes: runs of the dense head, the one on the prompt included.
        drafted: tokens drafted.
        accepted: drafts that were the dense model's own tokens, in every row, as were all those before it.

    Example:
        >>> from hf_topk import LosslessStats
        >>> stats = LosslessStats(tokens=64, dense_passes=8, drafted=60, accepted=57)
        >>> stats.dense_passes_per_token, stats.acceptance
        (0.125, 0.95)
    """

    tokens: int = 0
    forward_passes: int = 0
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
    def forward_passes_per_token(self) -> float:
        """Runs of the model for a new token: 1 in dense decoding."""
        return self.forward_passes / max(1, self.tokens)


@contextmanager
def generating(*, is_lossless: bool) -> Iterator[None]:
    """For a while, and in this thread alone, say whether what is generated is to be lossless.

    Args:
        is_lossless: whether it is.
    """
    before = is_lossless_generation.set(is_lossless)
    try:
        yield
    finally:
        is_lossless_generation.reset(before)


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

    def __init__(self, model: Any, drafter: Drafter, synced_gpus: bool) -> None:
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
        self._block: BlockReader | None = None
        self._size = FIRST_SIZE
        self.stats = LosslessStats(tokens=1, forward_passes=1, dense_passes=1)

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
            block = self._drafter.draft(input_ids, kwargs, size, self._cache)
            self._block = BlockReader(block)
            self.stats.forward_passes += len(block.outputs)
            self.stats.dense_passes += 1
            self.stats.drafted += len(block.guesses)
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
        self.stats.forward_passes += 1
        self.stats.dense_passes += 1
        return self._model(**self._model.prepare_inputs_for_generation(input_ids, **kwargs), return_dict=True)

    def _end_block(self) -> None:
        """Take from the cache what was drafted in vain, and learn from it how far to draft."""
        if self._block is None or self._cache is None:
            return
        block, served = self._block.block, self._block.served
        self._block = None
        self._cache.back(len(block.outputs) - served)
        accepted = served - 1
        self.stats.accepted += accepted
        if accepted < len(block.guesses):
            self._size = accepted + 1
        elif len(block.outputs) == self._size:
            self._size = min(LARGEST_SIZE, 2 * self._size)


class BlockReader:
    """Serves the positions of a verified block, one after the other.

    Attributes:
        block: what was drafted and verified.
        served: the number of positions that were made use of.
    """

    def __init__(self, block: Block) -> None:
        """Begin before the first position.

        Args:
            block: a verified block.
        """
        self.block = block
        self.served = 0

    def goes_on_with(self, tokens: Tensor) -> bool:
        """Whether the next position is in the block and was drafted from these tokens, [B]."""
        block, served = self.block, self.served
        return served < len(block.outputs) and bool(tokens.equal(block.guesses[served - 1]))

    def serve(self) -> Any:
        """The output of the next position, with dense logits."""
        output = self.block.outputs[self.served]
        output.logits = self.block.dense[:, self.served : self.served + 1]
        self.served += 1
        return output
