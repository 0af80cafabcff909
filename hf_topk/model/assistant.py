"""A converted model in assisted generation: as target, and as assistant of a target with another tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .configuration_topk_experts import TopKExpertsConfig
from .head import TopKExpertsHead
from .linear_like import as_linear


class SharedTokens:
    """Replaces the head while a model drafts for a target with another tokenizer.

    Transformers restricts the assistant to the tokens that both tokenizers share, renumbered from 0 (N. Timor et al.,
    "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous Vocabularies", 2025).

    Attributes:
        head: the converted model's.
        ids: the assistant's own ids of the shared tokens, by their new ids, [P].
    """

    def __init__(self, head: TopKExpertsHead, ids: Tensor) -> None:
        """Start a generation, with the prompt in the assistant's own ids."""
        self.head, self.ids = head, ids
        self._in_own_ids = True

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of the shared tokens: hidden [..., d] to [..., P]."""
        return self.head.logits(hidden)[..., self.ids.to(hidden.device)]

    def own_ids(self, input_ids: Tensor) -> Tensor:
        """The next input of a generation in the assistant's own ids; all inputs but the first are in new ids."""
        if self._in_own_ids:
            self._in_own_ids = False
            return input_ids
        return self.ids.to(input_ids.device)[input_ids]


class AssistantMixin:
    """Replaces a converted model's head and input embeddings, and lets it take part in assisted generation.

    For a target with another tokenizer, Transformers replaces the assistant's head and embeddings by pruned ones for
    good. Here the pruned ones only tell which tokens are shared, while the model drafts for that target.
    """

    base: PreTrainedModel
    config: TopKExpertsConfig
    generation_config: GenerationConfig
    head_name: str
    # The pruned input embeddings for targets. Transformers sets their `map` to False right before it asks for a draft.
    _of_targets: tuple[Any, ...] = ()
    _own_penalty: float | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        # It also sets it before a target's last token, where nothing is drafted. Every request for a draft reads the
        # device first, so resetting here leaves `map` False only for the target that then asks.
        for embeddings in self._of_targets:
            embeddings.map = True
        return cast(torch.device, cast(Any, super()).device)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the dense model's input embeddings; pruned ones for a target only tell the shared tokens."""
        if hasattr(value, "assistant_overlap_token_ids"):
            self._of_targets += (value,)
            self._own_penalty = self.generation_config.repetition_penalty
        else:
            self.base.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the dense head's rows; new token ids become always-on.

        Args:
            new_embeddings: a linear layer [V', d], as when token embeddings are resized; one that is quantised or of a
                custom class is converted to a plain one; an earlier head is put back unchanged.

        Raises:
            InputError: when it is not a linear layer over the hidden states, or has too few rows to route; the model
                is then unchanged.
        """
        if hasattr(new_embeddings, "pruned_lm_head"):  # for a target; `set_input_embeddings` has the shared tokens
            return
        if isinstance(new_embeddings, TopKExpertsHead):
            head = new_embeddings
            head.take_over(head)  # with tied embeddings, Transformers has already resized it
        else:
            present: TopKExpertsHead = cast(Any, self).head
            head = present.with_rows_of(as_linear(new_embeddings, present))
        self.base.set_submodule(self.head_name, head)
        self.config.num_always_on = head.num_always_on
        if hasattr(self.base, "vocab_size"):  # some dense models reshape logits by it for the loss
            self.base.vocab_size = head.out_features

    @contextmanager
    def _drafting_for(self, generation_config: GenerationConfig | None) -> Iterator[SharedTokens | None]:
        """Inside, draft with the tokens shared with the target, if its tokenizer is another; else yield None."""
        is_asked = getattr(generation_config, "is_assistant", False)
        embeddings = next((one for one in self._of_targets if is_asked and not one.map), None)
        if embeddings is None:
            yield None
            return
        config = self.generation_config
        # While drafting, ids differ, so Transformers removes the repetition penalty, and does not restore it.
        self._own_penalty = config.repetition_penalty or self._own_penalty
        config.repetition_penalty = None
        try:
            yield SharedTokens(cast(Any, self).head, embeddings.assistant_overlap_token_ids)
        finally:
            config.repetition_penalty = self._own_penalty

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        # Transformers chooses the candidate generator by the model's class name and reads the head from an attribute.
        # With early exit, it calls the model itself, so that must be the converted one.
        if generation_config.assistant_early_exit is not None:
            return cast(Any, super())._get_candidate_generator(generation_config, *args, **kwargs)
        with self._as_checkpoint_of_dense() if generation_config.use_mtp else nullcontext() as head:
            generator = cast(Any, self.base)._get_candidate_generator(generation_config, *args, **kwargs)
        if head is not None:
            generator.mtp_model.shared_head = head
        return generator

    @contextmanager
    def _as_checkpoint_of_dense(self) -> Iterator[TopKExpertsHead]:
        """Inside, Transformers can load multi-token prediction layers from the dense model; yields the head."""
        head: TopKExpertsHead = cast(Any, self).head
        if self.config.name_or_path:
            self.base.config.name_or_path = self.config.name_or_path
        self.base.set_submodule(self.head_name, head.as_plain())  # the checkpoint has no additions of the sparse head
        try:
            yield head
        finally:
            self.base.set_submodule(self.head_name, head)
