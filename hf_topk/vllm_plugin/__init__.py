"""Converted models in vLLM: found by its entry point `vllm.general_plugins`, so that installing it is all it takes.

Nothing of vLLM is imported before vLLM asks for it, and none of its classes is changed.
"""

ARCHITECTURE = "TopKExpertsForCausalLM"
MODEL_CLASS = "hf_topk.vllm_plugin.model:TopKExpertsForCausalLM"


def register() -> None:
    """Tell vLLM what a converted model is; it does so in every process, maybe more than once.

    What vLLM reads its `config.json` with was registered when `hf_topk` was imported.
    """
    from vllm import ModelRegistry

    from .counters import offer_counters

    ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    offer_counters()
