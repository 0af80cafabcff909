"""What a converted model answers by the dense model in it."""

from torch import nn
from transformers import PreTrainedModel


class DensePartsMixin:
    """The parts of the dense model, where Transformers and trainers look for them."""

    base: PreTrainedModel

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
