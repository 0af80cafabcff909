"""Converts tiny random encoder-decoders in memory, and checks the results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hf_topk.convert import Recipe, convert
from hf_topk.model.cache_rollback import cache_among, why_not_croppable
from hf_topk.model.errors import InputError
from hf_topk.targets import TargetWindow
from studies.checks import are_close, check, every_draft
from studies.tiny_models import FIRST_OTHER_ID, LOGIT_DEVIATION, PADDING, VOCAB_SIZE, tiny_config, tiny_model

NEW_TOKENS = 12
DOCUMENTS, TARGET_LENGTH = 24, 8
FRAMES, SAMPLES = 200, 8000  # of speech: of spectrograms, and of waveforms


@dataclass(frozen=True)
class RandomSource:
    """A random input of an encoder.

    Attributes:
        inputs: arguments of the model, [1, ...] each.
    """

    inputs: dict[str, Tensor]

    @property
    def length(self) -> int:
        """The length of a target, so that a batch has a few sources."""
        return TARGET_LENGTH

    def together(self, sources: "Sequence[RandomSource]") -> dict[str, Tensor]:
        """Model inputs for a batch; all have the same shape."""
        return {name: torch.cat([one.inputs[name] for one in sources]) for name in self.inputs}


@torch.no_grad()
def tiny_encoder_decoder(auto_class: Any, model_type: str) -> PreTrainedModel:
    """Make a random encoder-decoder, or a model of a type without an encoder that has the same Auto class.

    Args:
        auto_class: one of Transformers' Auto classes of models.
        model_type: its name in Transformers.

    Raises:
        Exception: whatever Transformers raises if the model cannot be built or cannot generate.
    """
    config = tiny_config(model_type)
    if not config.is_encoder_decoder:
        return tiny_model(auto_class, model_type)
    torch.manual_seed(0)
    config.decoder_start_token_id = PADDING
    dense: PreTrainedModel = auto_class.from_config(config).eval()
    dense.generation_config.decoder_start_token_id = PADDING
    inputs, head = accepted_inputs(dense), dense.get_output_embeddings()
    if isinstance(head, nn.Linear):
        head.weight.mul_(LOGIT_DEVIATION / _logits(dense, inputs).std())
    _text(dense, inputs)
    return dense


def accepted_inputs(dense: PreTrainedModel) -> dict[str, Tensor]:
    """Random inputs that a model accepts: text, or speech in the first shape that it accepts.

    Args:
        dense: a tiny dense model.

    Raises:
        InputError: when it accepts none of them.
    """
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(FIRST_OTHER_ID, VOCAB_SIZE, (1, 6), generator=generator)
    shapes: list[dict[str, Tensor]] = [{"input_ids": text, "attention_mask": torch.ones_like(text)}]
    config = dense.config
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    sizes = [getattr(config, name, None) for name in names]
    length = 2 * getattr(config, "max_source_positions", FRAMES // 2)
    for size in (*filter(None, sizes), 80):
        both = ((1, size, length), (1, length, size))
        shapes += [{"input_features": torch.randn(shape, generator=generator)} for shape in both]
    shapes.append({"input_values": torch.randn(1, SAMPLES, generator=generator)})
    name = type(dense).main_input_name
    for inputs in sorted(shapes, key=lambda one: name not in one):
        try:
            _logits(dense, inputs)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            continue
        return inputs
    raise InputError("it accepts neither text alone nor speech of a usual shape")


def check_encoder_decoder(dense: PreTrainedModel, recipe: Recipe, folder: Path) -> None:
    """Convert a dense model in memory, save and load it, and check the result.

    With all experts its logits and its text, greedy and by beam search, are the dense model's; lossless decoding gives
    the dense model's tokens; and its folder loads as the dense model.

    Args:
        dense: a tiny dense model.
        recipe: of the conversion.
        folder: an empty folder.

    Raises:
        InputError: when the model is refused.
        TopKExpertsError: when a check fails.
    """
    inputs = accepted_inputs(dense)
    expected, text = _logits(dense, inputs), _text(dense, inputs)
    report = convert(dense, None, recipe, windows=_windows(inputs))
    report.model.save_pretrained(folder)
    auto_class = getattr(transformers, report.model.auto_class)
    model = auto_class.from_pretrained(folder)
    model.head_mode = "sparse"
    as_dense = auto_class.from_pretrained(folder, config=AutoConfig.from_pretrained(folder).text_config)
    check(are_close(_logits(as_dense, inputs), expected), "loaded as the dense model it gives different logits")
    model.num_experts_per_tok = model.head.num_experts
    check(are_close(_logits(model, inputs), expected), "with all experts its logits are not the dense model's")
    check(_text(model, inputs) == text, "with all experts its text is not the dense model's")
    beams = _text(dense, inputs, num_beams=2)
    check(_text(model, inputs, num_beams=2) == beams, "with all experts its beams are not the dense model's")
    model.num_experts_per_tok = model.head.num_experts // 2
    with every_draft():
        written = _generated(model, inputs, lossless=True, return_dict_in_generate=True)
    sequences = written["sequences"] if isinstance(written, dict) else written.sequences
    check(sequences.tolist() == text, "its lossless text is not the dense model's")
    stats, cache = model.last_generation_stats, cache_among(written)
    has_drafted = stats is not None and stats.drafted > 0
    check(has_drafted or why_not_croppable(cache, has_encoder=True) is not None, "its lossless text is not drafted")


def _windows(inputs: dict[str, Tensor]) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(FIRST_OTHER_ID, VOCAB_SIZE, (DOCUMENTS, TARGET_LENGTH + 1), generator=generator).tolist()
    return [
        TargetWindow(number, tuple(target[:-1]), RandomSource(inputs), first=0, last_token=target[-1])
        for number, target in enumerate(targets)
    ]


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    decoder = torch.tensor([[PADDING, 75, 67, 92, 58]])
    return model(**inputs, decoder_input_ids=decoder, use_cache=False).logits.float()


def _generated(model: Any, inputs: dict[str, Tensor], **choices: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, **choices)


def _text(model: Any, inputs: dict[str, Tensor], **choices: Any) -> list[list[int]]:
    written = _generated(model, inputs, return_dict_in_generate=True, **choices)
    tokens: list[list[int]] = written["sequences"].tolist()
    return tokens
