"""A converted model in assisted generation: as the assistant of a target with another tokenizer, and as the target."""

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
    """Stands in for the head while a model drafts for a target with another tokenizer.

    Transformers has the assistant know no tokens but those that both tokenizers have, under new ids: their places in a
    list (N. Timor et al., "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous
    Vocabularies", 2025).

    Attributes:
        head: the converted model's.
        ids: the assistant's own ids of these tokens, by their new ones, [P].
    """

    def __init__(self, head: TopKExpertsHead, ids: Tensor) -> None:
        """Begin a generation, with the prompt in the assistant's own ids."""
        self.head, self.ids = head, ids
        self._in_own_ids = True

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of these tokens alone: hidden [..., d] to [..., P]."""
        return self.head.logits(hidden)[..., self.ids.to(hidden.device)]

    def own_ids(self, input_ids: Tensor) -> Tensor:
        """The next input of a generation in the assistant's own ids: all but the first are in new ones."""
        if self._in_own_ids:
            self._in_own_ids = False
            return input_ids
        return self.ids.to(input_ids.device)[input_ids]


class AssistantMixin:
    """What is put in place of a converted model's head and input embeddings, and how it takes part in assisting.

    For an assistant of a target with another tokenizer Transformers puts pruned ends in place, and leaves them there.
    Here they only tell which tokens the two share: they count while the model drafts for that target, and nowhere else.
    """

    base: PreTrainedModel
    config: TopKExpertsConfig
    generation_config: GenerationConfig
    head_name: str
    # The input embeddings made for targets, of which Transformers sets `map` to False right before it asks for a draft.
    _of_targets: tuple[Any, ...] = ()
    _own_penalty: float | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        # It does so before a target's last token, too, when there is nothing left to draft. Whatever asks for a draft
        # next, for whichever target, asks for the device first: what is False after that is of this target.
        for embeddings in self._of_targets:
            embeddings.map = True
        return cast(torch.device, cast(Any, super()).device)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the dense model's input embeddings; those that Transformers makes for a target name its tokens."""
        if hasattr(value, "assistant_overlap_token_ids"):
            self._of_targets += (value,)
            self._own_penalty = self.generation_config.repetition_penalty
        else:
            self.base.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the dense head's rows; ids that are new become always-on.

        Args:
            new_embeddings: a linear layer [V', d], as token embeddings are resized with; one that is quantised or a
                class of its own is read out into a plain one; a head that was there before is taken as it is.

        Raises:
            InputError: when it is no linear layer over the hidden states, or has too few rows to route; the model
                stays as it was.
        """
        if hasattr(new_embeddings, "pruned_lm_head"):  # for a target: `set_input_embeddings` has its tokens
            return
        if isinstance(new_embeddings, TopKExpertsHead):
            head = new_embeddings
            head.take_over(head)  # where embeddings are tied, Transformers has resized it already
        else:
            present: TopKExpertsHead = cast(Any, self).head
            head = present.with_rows_of(as_linear(new_embeddings, present))
        self.base.set_submodule(self.head_name, head)
        self.config.num_always_on = head.num_always_on
        if hasattr(self.base, "vocab_size"):  # by which some dense models shape logits for the loss
            self.base.vocab_size = head.out_features

    @contextmanager
    def _drafting_for(self, generation_config: GenerationConfig | None) -> Iterator[SharedTokens | None]:
        """Within it the tokens are those shared with the target that asks for a draft, if its tokenizer is another."""
        is_asked = getattr(generation_config, "is_assistant", False)
        embeddings = next((one for one in self._of_targets if is_asked and not one.map), None)
        if embeddings is None:
            yield None
            return
        config = self.generation_config
        # Transformers removes the repetition penalty, since ids are other ones while drafting, and leaves it removed.
        self._own_penalty = config.repetition_penalty or self._own_penalty
        config.repetition_penalty = None
        try:
            yield SharedTokens(cast(Any, self).head, embeddings.assistant_overlap_token_ids)
        finally:
            config.repetition_penalty = self._own_penalty

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        # Which targets a candidate generator is for, Transformers reads off the name of the class, and the head off an
        # attribute. Where a model drafts for itself by its first layers, it is this one that is called.
        if generation_config.assistant_early_exit is not None:
            return cast(Any, super())._get_candidate_generator(generation_config, *args, **kwargs)
        with self._as_checkpoint_of_dense() if generation_config.use_mtp else nullcontext() as head:
            generator = cast(Any, self.base)._get_candidate_generator(generation_config, *args, **kwargs)
        if head is not None:
            generator.mtp_model.shared_head = head
        return generator

    @contextmanager
    def _as_checkpoint_of_dense(self) -> Iterator[TopKExpertsHead]:
        """Within it the dense model is one whose layers for further tokens Transformers can load; yields the head."""
        head: TopKExpertsHead = cast(Any, self).head
        if self.config.name_or_path:
            self.base.config.name_or_path = self.config.name_or_path
        self.base.set_submodule(self.head_name, head.as_plain())  # all that a head has is looked for in the checkpoint
        try:
            yield head
        finally:
            self.base.set_submodule(self.head_name, head)
