"""Converted encoder-decoder models, for translation and speech recognition."""

from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_outputs import Seq2SeqLMOutput

from .checkpoint_names import NamesUnder
from .dense_model import dense_class_of, is_speech_class
from .head import TopKExpertsHead
from .modeling_topk_experts import TopKExpertsForCausalLM


class TopKExpertsForSeq2SeqLM(TopKExpertsForCausalLM):
    """A dense encoder-decoder whose output head reads only the experts its router picks.

    It behaves as [`TopKExpertsForCausalLM`]. `generate` is that of the dense model's class.

    Examples:
        >>> import hf_topk
        >>> from transformers import AutoModelForSeq2SeqLM
        >>> model = AutoModelForSeq2SeqLM.from_pretrained("out")  # doctest: +SKIP
    """

    auto_class = "AutoModelForSeq2SeqLM"

    def _adopt(self, dense: PreTrainedModel) -> None:
        super()._adopt(dense)
        if hasattr(dense, "final_logits_bias"):
            tell = partial(_tell_head_of_bias, self.head_name)
            dense.register_forward_pre_hook(tell)  # the bias may be loaded or resized later
            tell(dense)
        if hasattr(dense, "prepare_decoder_input_ids_from_labels"):  # data collators call it
            self.prepare_decoder_input_ids_from_labels = dense.prepare_decoder_input_ids_from_labels

    def forward(  # type: ignore[override]  # these models have other first arguments
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Run the dense model with the replaced head; arguments and outputs are the dense model's.

        Args:
            input_ids: token ids of the source, [B, T].
            attention_mask: 1 for source tokens to attend to, [B, T].
            decoder_input_ids: token ids of the target, [B, U].
            labels: token ids to compute the loss on, -100 to ignore a position, [B, U].
            **kwargs: further arguments of the dense model, such as `encoder_outputs` and the KV cache.

        Returns:
            The dense model's output, with logits [B, U, V].

        Raises:
            InputError: when an adapter was put around a head that is tied to the input embeddings.
        """
        if decoder_input_ids is not None:
            kwargs["decoder_input_ids"] = decoder_input_ids
        return cast(Any, super()).forward(input_ids, attention_mask, labels=labels, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize embeddings and head as Transformers does, and the dense model's `final_logits_bias`, if any."""
        resized = super().resize_token_embeddings(*args, **kwargs)
        if hasattr(self.base, "_resize_final_logits_bias"):
            cast(Any, self.base)._resize_final_logits_bias(self.head.out_features)
        return resized

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The dense model's encoder."""
        return cast(Any, self.base).get_encoder(*args, **kwargs)


class TopKExpertsForSpeechSeq2Seq(TopKExpertsForSeq2SeqLM):
    """A [`TopKExpertsForSeq2SeqLM`] for speech recognition.

    Its configuration has the dense model's `model_type` in memory, by which Transformers' pipeline for speech
    recognition recognises Whisper. On disk it has the converted model's.

    Examples:
        >>> import hf_topk
        >>> from transformers import AutoModelForSpeechSeq2Seq
        >>> model = AutoModelForSpeechSeq2Seq.from_pretrained("out")  # doctest: +SKIP
    """

    auto_class = "AutoModelForSpeechSeq2Seq"

    def _adopt(self, dense: PreTrainedModel) -> None:
        super()._adopt(dense)
        self.config.model_type = dense.config.model_type  # type: ignore[misc]  # of this instance only


def converted_class(config: PreTrainedConfig, dense: PreTrainedModel | None = None) -> type[TopKExpertsForCausalLM]:
    """The class of a converted model.

    Args:
        config: the dense model's configuration.
        dense: the dense model, if loaded: its configuration need not name its class.

    Raises:
        InputError: when Transformers has no class for the dense model.
    """
    if not config.is_encoder_decoder:
        return TopKExpertsForCausalLM
    dense_class = dense_class_of(config) if dense is None else type(dense)
    return TopKExpertsForSpeechSeq2Seq if is_speech_class(dense_class.__name__) else TopKExpertsForSeq2SeqLM


def _tell_head_of_bias(name: str, dense: nn.Module, *_: Any) -> None:
    head = dense.get_submodule(name)
    if isinstance(head, TopKExpertsHead):
        vars(head)["later_bias"] = dense.final_logits_bias  # not as a buffer: that is the dense model's


# By class name, as a speech model's configuration has the dense model's type.
for converted in (TopKExpertsForSeq2SeqLM, TopKExpertsForSpeechSeq2Seq):
    register_checkpoint_conversion_mapping(
        converted.__name__, [NamesUnder(converted.base_model_prefix)], overwrite=True
    )
