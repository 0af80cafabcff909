"""A converted model and its dense argmax on a text, which the studies of agreement start from."""

from hf_topk.convert.steps.held_out import DenseArgmax, dense_argmax
from hf_topk.documents import read_documents
from hf_topk.loading import load_converted
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.windows import WINDOW_LENGTH, make_windows, readable_length


def load_and_run(name: str, text: str, positions: int) -> tuple[TopKExpertsForCausalLM, DenseArgmax]:
    """Load a converted model in float32, and run it on a text.

    Args:
        name: of the model: a folder, or a repository of the Hub.
        text: that the conversion has not seen: a file, a folder, or a data set.
        positions: tokens of the text, at most.

    Returns:
        The model, and the dense argmax at each position.

    Raises:
        InputError: when the model does not load, or the text cannot be read.
    """
    model, tokenizer = load_converted(name, dtype="float32")
    length = readable_length(model.config, WINDOW_LENGTH)
    return model, dense_argmax(model, make_windows(read_documents(text), tokenizer, length, positions, seed=0))
