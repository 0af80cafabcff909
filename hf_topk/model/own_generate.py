"""`generate` as the dense model's own class has it: encoder-decoders' and Whisper's among them."""

from typing import Any, cast

from transformers import GenerationMixin

from .logits_processors import adapt
from .lossless import is_lossless_generation


class OwnGenerateMixin:
    """Runs the `generate` of the dense model's class where it is another one, with a converted model's steps inside."""

    base: Any

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as Transformers does, or as the dense model's class does if it has a way of its own."""
        dense = self.base
        if not (dense.config.is_encoder_decoder or type(dense).generate is not GenerationMixin.generate):
            return cast(Any, super()).generate(inputs, generation_config, *args, **kwargs)
        dense.generation_config = cast(Any, self).generation_config
        if args:
            return _with_steps_of(self).generate(inputs, generation_config, *args, **kwargs)
        # By name, since not every class has it in the second place; and inputs may have another name than the first.
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        return _with_steps_of(self).generate(*(() if inputs is None else (inputs,)), **kwargs)


def _with_steps_of(model: Any) -> Any:
    """The dense model in a converted one, as an object of its own class but for the steps of sampling.

    It shares all that the dense model has. `generate` looks for its steps in the object's class, and those of the dense
    class may ask for an object of that class, so neither the converted model nor a proxy would do.
    """
    dense = model.base

    class WithSteps(type(dense)):  # type: ignore[misc]
        def _sample(self, *args: Any, **kwargs: Any) -> Any:
            return model._sample(*args, **kwargs)

        def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_logits_processor(*args, **kwargs)
            return found if is_lossless_generation.get() else adapt(found)

    WithSteps.__name__ = type(dense).__name__  # by which Transformers tells some models
    view = WithSteps.__new__(WithSteps)
    view.__dict__ = dense.__dict__
    return view
