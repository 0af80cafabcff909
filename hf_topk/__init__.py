"""hf-topk: language models whose output head reads only a few experts of the vocabulary.

Importing this package registers the converted models with Transformers' Auto classes.
"""

import pkgutil

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)

from .model.configuration_topk_experts import TopKExpertsConfig
from .model.encoder_decoder import TopKExpertsForSeq2SeqLM, TopKExpertsForSpeechSeq2Seq
from .model.errors import InputError, TopKExpertsError
from .model.head import TopKExpertsHead
from .model.lossless import LosslessStats
from .model.modeling_topk_experts import TopKExpertsForCausalLM

__all__ = [
    "InputError",
    "LosslessStats",
    "TopKExpertsConfig",
    "TopKExpertsError",
    "TopKExpertsForCausalLM",
    "TopKExpertsForSeq2SeqLM",
    "TopKExpertsForSpeechSeq2Seq",
    "TopKExpertsHead",
]

# The converter is in another folder of a checkout: find it when Python runs at its root, too.
__path__ = pkgutil.extend_path(__path__, __name__)

# Saved models contain a copy of the code, for use without this package.
TopKExpertsConfig.register_for_auto_class()
for model_class in (TopKExpertsForCausalLM, TopKExpertsForSeq2SeqLM, TopKExpertsForSpeechSeq2Seq):
    model_class.register_for_auto_class(model_class.auto_class)
AutoConfig.register(TopKExpertsConfig.model_type, TopKExpertsConfig, exist_ok=True)
AutoModelForCausalLM.register(TopKExpertsConfig, TopKExpertsForCausalLM, exist_ok=True)
# For dense models that take images; `AutoModelForCausalLM` loads these too.
AutoModelForImageTextToText.register(TopKExpertsConfig, TopKExpertsForCausalLM, exist_ok=True)
AutoModelForMultimodalLM.register(TopKExpertsConfig, TopKExpertsForCausalLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(TopKExpertsConfig, TopKExpertsForSeq2SeqLM, exist_ok=True)
AutoModelForSpeechSeq2Seq.register(TopKExpertsConfig, TopKExpertsForSpeechSeq2Seq, exist_ok=True)
