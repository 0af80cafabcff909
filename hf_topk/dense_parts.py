"""What a converted model answers by the dense model in it."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from .configuration_topk_experts import TopKExpertsConfig
from .errors import InputError


class DensePartsMixin:
    """The parts of the dense model and its steps of `generate`, where Transformers and trainers look for them."""

    base: PreTrainedModel
    config: TopKExpertsConfig
    head_name: str

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

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors by the names of `state_dict`, or by those in checkpoints, which are the dense model's own.

        Args:
            state_dict: tensors by name.
            strict: whether every name has to be there, and no other.
            assign: whether to take the tensors themselves, not their values.

        Returns:
            The names that are missing, and those that are unexpected.

        Raises:
            InputError: when one router is packed and the other in floats.
        """
        own = cast(Any, super()).state_dict()
        renamed = {name if name in own else f"base.{name}": tensor for name, tensor in state_dict.items()}
        router = f"base.{self.head_name}.router"
        forms = ["in floats" if f"{router}.rows" in tensors else "packed" for tensors in (own, renamed)]
        if f"{router}.bias" in renamed and forms[0] != forms[1]:
            raise InputError(
                f"the router is {forms[0]} in the model and {forms[1]} in the checkpoint: what was saved inside "
                "`joint_training` is loaded inside it, and what was saved outside, outside"
            )
        return cast(Any, super()).load_state_dict(renamed, strict=strict, assign=assign)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare the inputs of a generation step as the dense model does."""
        return cast(Any, self.base).prepare_inputs_for_generation(*args, **kwargs)

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        # Transformers reads the kind of cache, and the name it is passed by, off the name of the class.
        return cast(Any, self.base)._prepare_cache_for_generation(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # Which arguments there are, Transformers reads off the signature of `forward`.
        cast(Any, self.base)._validate_model_kwargs(model_kwargs)

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        # Whether embeddings may stand for a prompt, Transformers reads off `prepare_inputs_for_generation`.
        return cast(Any, self.base)._prepare_model_inputs(*args, **kwargs)
