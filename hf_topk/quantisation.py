"""What Transformers keeps of how a model was quantised, carried over to the model that is made of it."""

from transformers import PreTrainedModel

MARKS = {"hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"}


def mark_as_quantised(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Let a model be saved as one whose body was quantised, if it was.

    Args:
        model: a converted model; changed.
        dense: the dense model in it.
    """
    for name in MARKS & vars(dense).keys():
        setattr(model, name, getattr(dense, name))
    if (how := getattr(dense.config, "quantization_config", None)) is not None:
        model.config.quantization_config = how
