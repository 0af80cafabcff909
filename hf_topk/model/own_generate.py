"""Runs the dense model's own `generate`, such as those of encoder-decoders and Whisper."""

from typing import Any, cast

from transformers import GenerationMixin

from .logits_processors import adapt
from .lossless import is_lossless_generation


class OwnGenerateMixin:
    """Runs the `generate` of the dense model's class if it overrides Transformers', with a converted model's steps."""

    base: Any

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as Transformers does, or as the dense model's class does if it overrides `generate`."""
        dense = self.base
        if not (dense.config.is_encoder_decoder or type(dense).generate is not GenerationMixin.generate):
            return cast(Any, super()).generate(inputs, generation_config, *args, **kwargs)
        dense.generation_config = cast(Any, self).generation_config
        if args:
            return _with_steps_of(self).generate(inputs, generation_config, *args, **kwargs)
        # By keyword: the order of the parameters and the name of the first differ between classes.
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        return _with_steps_of(self).generate(*(() if inputs is None else (inputs,)), **kwargs)


def _with_steps_of(model: Any) -> Any:
    """The dense model of a converted one as an instance of a subclass, which runs the converted model's sampling steps.

    It shares the dense model's attributes. `generate` looks its steps up in the instance's class, and the dense class
    may require an instance of itself. So neither the converted model nor a proxy would do.
    """
    dense = model.base

    class WithSteps(type(dense)):  # type: ignore[misc]
        def _sample(self, *args: Any, **kwargs: Any) -> Any:
            return model._sample(*args, **kwargs)

        def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_logits_processor(*args, **kwargs)
            return found if is_lossless_generation.get() else adapt(found)

    WithSteps.__name__ = type(dense).__name__  # Transformers recognises some models by it
    view = WithSteps.__new__(WithSteps)
    view.__dict__ = dense.__dict__
    return view
