"""A vLLM plugin for converted models, which vLLM finds by the entry point `vllm.general_plugins`.

vLLM is imported only when it calls `register`, and none of its classes is changed.
"""

ARCHITECTURE = "TopKExpertsForCausalLM"
MODEL_CLASS = "hf_topk.vllm_plugin.model:TopKExpertsForCausalLM"


def register() -> None:
    """Register the model class with vLLM, which calls this in every process, perhaps more than once.

    The configuration class was registered with Transformers when `hf_topk` was imported.
    """
    from vllm import ModelRegistry

    from .counters import offer_counters

    ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    offer_counters()
