"""Lossless decoding: the sparse head drafts a block of tokens, and the dense head verifies it in one pass.

Transformers' own sampling loop runs unchanged on the dense logits of every step; the forward call hides that these are
computed a block at a time. A block of n positions takes n forward passes of the decoder. The head keeps the hidden
states that enter it. For the first n - 1 it returns sparse logits, from which a draft token is chosen as the loop would
choose it. The last pass is the verification pass: it computes the dense logits of all n states in one product, or of
those tokens alone that could be the likeliest ([`certified_screen`]), and the loop chooses its tokens from these. While
they equal the draft tokens, no model runs. At the first rejected draft token the KV cache is cropped and the next block
starts. So logits processors, stopping criteria, streamers and scores see exactly what they see in dense decoding,
whatever was drafted.

This holds for sampling, too. Speculative decoding usually accepts a draft token with probability min(1, p / q). Here
drafter and loop draw with the same noise: both take the token of largest p(v) / noise(v), which is usually the same
one. The output does not depend on the draft tokens: the same seed gives the tokens of dense decoding
("Drafter-invariant speculative decoding", Daliri et al., arXiv 2408.07978).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from .cache_rollback import CroppableCache, cache_among, why_not_croppable
from .drafting import MOST_POSITIONS, Block, Drafter, Verify

logger = logging.get_logger(__name__)

# Whether the current generation of this thread is lossless.
is_lossless_generation: ContextVar[bool] = ContextVar("is_lossless_generation", default=False)

FIRST_SIZE, LARGEST_SIZE = 8, 24  # positions in a block


@dataclass
class LosslessStats:
    """Statistics of a lossless generation. The rows of a batch advance together and count once.

    Attributes:
        tokens: new tokens of the longest row.
        forward_passes: of the model, with prefill, which counts as one even in chunks.
        dense_passes: of the dense head, with prefill.
        drafted: draft tokens.
        accepted: draft tokens that were accepted in every row.

    Examples:
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
        """Share of the draft tokens that were accepted; 1 if there were none."""
        return self.accepted / self.drafted if self.drafted else 1.0

    @property
    def dense_passes_per_token(self) -> float:
        """Passes of the dense head per new token; 1 in dense decoding."""
        return self.dense_passes / max(1, self.tokens)

    @property
    def forward_passes_per_token(self) -> float:
        """Forward passes per new token; 1 in dense decoding."""
        return self.forward_passes / max(1, self.tokens)


@contextmanager
def generating(*, is_lossless: bool) -> Iterator[None]:
    """Set whether generations in this thread are lossless, inside the context.

    Args:
        is_lossless: whether they are.
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
    verify: Verify,
    synced_gpus: bool = False,
    **kwargs: Any,
) -> tuple[Any, LosslessStats]:
    """Run Transformers' sampling loop on dense logits that are computed a block at a time.

    Args:
        model: a converted model, whose head is replaced by the dense one meanwhile.
        input_ids: the prompt, [B, T].
        logits_processor: of the loop.
        stopping_criteria: of the loop.
        generation_config: of the loop.
        verify: runs a verification pass if the dense model returns the head's logits unchanged.
        synced_gpus: whether other processes wait for each forward pass.
        **kwargs: further arguments of the loop.

    Returns:
        The loop's result, and the statistics of the generation.
    """
    call = model.call_with_own_head(kwargs, generation_config)
    drafter = Drafter(model, call, logits_processor, stopping_criteria, generation_config)
    view = VerifiedModel(model, call, drafter, verify, synced_gpus)
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
    """Replaces the model in the sampling loop: returns the dense logits of each step, and drafts when it has none left.

    The loop calls `prepare_inputs_for_generation`, and then the model with exactly the arguments that this returned. So
    the former finds the output of a step and returns it as an argument, and the call of the model passes it on.

    Attributes:
        stats: the statistics so far.
    """

    def __init__(self, model: Any, call: Any, drafter: Drafter, verify: Verify, synced_gpus: bool) -> None:
        """Wrap a model for one generation.

        Args:
            model: a converted model.
            call: runs it.
            drafter: drafts and verifies blocks.
            verify: runs a verification pass if the dense model returns the head's logits unchanged.
            synced_gpus: whether other processes wait for each forward pass.
        """
        self._model, self._call = model, call
        self._drafter, self._verify = drafter, verify
        self._synced_gpus = synced_gpus
        self._cache: CroppableCache | None = None
        self._has_started = False
        self._block: BlockReader | None = None
        self._size = FIRST_SIZE
        self.stats = LosslessStats(tokens=1, forward_passes=1, dense_passes=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def _valid_auto_compile_criteria(self, *_: Any) -> bool:
        return False  # the loop would call a compiled forward of the model, not this object; `call` may be compiled

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        """Prefill as the loop does, and find out whether the dense model returns the head's logits unchanged.

        It may cap them, so that other tokens become equal to the likeliest, and the first of them is chosen.
        """
        head = self._model.head
        if self._verify == head.fastest_dense_logits:
            return self._model._prefill(*args, **kwargs)
        given: list[Tensor] = []

        def dense(hidden: Tensor) -> Tensor:
            logits = cast(Tensor, head.fastest_dense_logits(hidden))
            given[:] = [logits[:, -1].clone()]  # the dense model may change them in place
            return logits

        with head.replaced_by(dense):
            output = self._model._prefill(*args, **kwargs)
        returned = output.logits[:, -1]
        head.logits_are_changed = not (given and returned.equal(given[0].to(returned)))
        if not head.logits_are_changed:
            self._drafter.verify = self._verify
        return output

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Find the output of the next step, with which the loop then calls this object.

        Args:
            input_ids: the prefix, [B, T].
            **kwargs: the model's arguments.
        """
        cache = cache_among(kwargs)
        if not self._has_started or (self._cache is not None and not self._cache.wraps(cache)):
            self._end_block()  # Phi-3 starts a new cache at its first long position
            self._start(input_ids, cache)
        self.stats.tokens += 1
        if self._cache is None:
            return {"output": self._dense_step(input_ids, kwargs)}
        if self._block is None or not self._block.continues_with(input_ids[:, -1]):
            self._end_block()
            size = self._drafter.longest_block(input_ids, self._size, self._cache)
            block = self._drafter.draft(input_ids, kwargs, size, self._cache)
            self._block = BlockReader(block)
            self.stats.forward_passes += len(block.outputs)
            self.stats.dense_passes += 1
            self.stats.drafted += len(block.draft_tokens)
        return {"output": self._block.next_output()}

    def __call__(self, output: Any, **_: Any) -> Any:
        """Return the output that `prepare_inputs_for_generation` found."""
        return output

    def finish(self) -> None:
        """Leave the KV cache as dense decoding does."""
        self._end_block()

    def _start(self, input_ids: Tensor, cache: Any) -> None:
        """After prefill, check whether the KV cache can be cropped."""
        self._has_started, self._cache = True, None
        reason = why_not_croppable(cache, has_encoder=self._model.config.is_encoder_decoder)
        if self._synced_gpus:
            reason = "other processes wait for each forward pass"
        elif 2 * input_ids.shape[0] > MOST_POSITIONS:
            reason = f"a batch of more than {MOST_POSITIONS // 2} rows leaves no room for draft tokens"
        elif input_ids.device.type == "mps":
            reason = "on this device Transformers reads the cache one step late"
        if reason is None:
            self._cache = CroppableCache(cache)
            return
        logger.warning_once(
            f"Lossless decoding of this {type(self._model.base).__name__} verifies every token with the dense head, "
            f"which saves nothing: {reason}."
        )

    def _dense_step(self, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
        self.stats.forward_passes += 1
        self.stats.dense_passes += 1
        return self._call(**self._model.prepare_inputs_for_generation(input_ids, **kwargs), return_dict=True)

    def _end_block(self) -> None:
        """Crop rejected draft tokens, and adapt the size of the next block to how many were accepted."""
        if self._block is None or self._cache is None:
            return
        block, returned = self._block.block, self._block.returned
        self._block = None
        self._cache.crop(len(block.outputs) - returned)
        accepted = returned - 1
        self.stats.accepted += accepted
        if accepted < len(block.draft_tokens):
            self._size = max(accepted + 1, self._size // 2)
        elif len(block.outputs) == self._size:
            self._size = min(LARGEST_SIZE, 2 * self._size)


class BlockReader:
    """Returns the outputs of a verified block, position by position.

    Attributes:
        block: the verified block.
        returned: number of positions returned so far.
    """

    def __init__(self, block: Block) -> None:
        """Start before the first position.

        Args:
            block: a verified block.
        """
        self.block = block
        self.returned = 0

    def continues_with(self, tokens: Tensor) -> bool:
        """Whether the block has a next position, and its draft tokens equal these tokens, [B]."""
        block, returned = self.block, self.returned
        return returned < len(block.outputs) and bool(tokens.equal(block.draft_tokens[returned - 1]))

    def next_output(self) -> Any:
        """The output of the next position, with dense logits."""
        output = self.block.outputs[self.returned]
        output.logits = self.block.dense[:, self.returned : self.returned + 1]
        self.returned += 1
        return output
