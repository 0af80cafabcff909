"""What a converted model answers by the dense model in it."""

from torch import nn
from transformers import PreTrainedModel

from .configuration_topk_experts import TopKExpertsConfig
from .errors import InputError


class DensePartsMixin:
    """The parts of the dense model, where Transformers and trainers look for them."""

    base: PreTrainedModel
    config: TopKExpertsConfig

    def check_tied_ends(self) -> None:
        """Refuse adapters where they could not be merged: head and input embeddings are often one tensor.

        Raises:
            InputError: when they are, and an adapter was put around one of them.
        """
        ends = (self.base.get_output_embeddings(), self.base.get_input_embeddings())
        if self.config.tie_word_embeddings and any(hasattr(end, "base_layer") for end in ends):
            raise InputError(
                "there is an adapter around the head or the input embeddings, which are one tensor in this model, so "
                "it cannot be merged: leave both out of what is adapted"
            )

    @property
    def base_model(self) -> nn.Module:
        """The dense model without its head, for what makes a loss of hidden states and the head's weight by itself."""
        return self.base.base_model

    def get_input_embeddings(self) -> nn.Module:
        """The dense model's input embeddings."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the dense model's input embeddings."""
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head, weight and experts and all, or what an adapter has put around it."""
        return self.base.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """The dense model without its head."""
        return self.base.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        """Replace the dense model without its head."""
        self.base.set_decoder(decoder)
