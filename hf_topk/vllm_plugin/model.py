"""The model class of a converted model in vLLM: vLLM's class of the dense model, with its head replaced."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.utils import get_model_architecture, initialize_model
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.interfaces import (
    SupportsPP,
    has_inner_state,
    is_attention_free,
    is_hybrid,
    supports_multimodal,
    supports_pp,
)
from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

from ..model.configuration_topk_experts import TopKExpertsConfig
from ..model.dense_model import dense_class_of
from ..model.errors import InputError
from .additions import Additions, names_of_additions
from .head_method import SparseHeadMethod
from .sharded_head import ShardedHead

WITHOUT_SPARSE_HEAD = 'serve it with its dense head: --hf-overrides \'{"head_mode": "dense"}\''


class SparseHeadMixin:
    """Replaces the head of a vLLM model after it is built, and loads a converted checkpoint.

    Attributes:
        sparse_head: computes the logits; None if the head runs dense, and on pipeline ranks without the head.
        names_added: names of the tensors that conversion added.
    """

    sparse_head: SparseHeadMethod | None
    names_added: frozenset[str]

    def take_converted_head(self, vllm_config: VllmConfig) -> None:
        """Replace the head by a sparse one, unless head mode is "dense".

        Args:
            vllm_config: vLLM's configuration, with the converted model's.

        Raises:
            InputError: when the sparse head cannot be used with this model or these settings.
        """
        config = vllm_config.model_config.hf_config
        self.sparse_head, self.names_added = None, names_of_additions(config)
        if config.head_mode == "dense" or not get_pp_group().is_last_rank:
            return
        check_settings(vllm_config)
        layer = find_head(self, config)
        self.sparse_head = SparseHeadMethod(layer, ShardedHead(layer, config))
        layer.quant_method = self.sparse_head

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """Load a converted checkpoint: the dense tensors by the dense class, then those that conversion added.

        Args:
            weights: names and tensors of the checkpoint.

        Returns:
            The names of the dense tensors that were loaded.

        Raises:
            InputError: when the checkpoint is damaged, or the added tensors do not fit the configuration.
        """
        additions = Additions(self.names_added)
        loaded: set[str] | None = super().load_weights(additions.set_aside(weights))  # type: ignore[misc]
        if self.sparse_head is not None:
            additions.load_into(self.sparse_head.head)
        return loaded


class TopKExpertsForCausalLM(nn.Module, SupportsPP):
    """The class that `config.json` names; its instances are of a subclass of the dense class, so names stay the same.

    From its methods vLLM infers, without a configuration, what a converted model supports; they are never called.
    """

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """Build the dense model, and replace its head.

        Args:
            vllm_config: vLLM's configuration, with the converted model's.
            prefix: of the names of its layers.

        Raises:
            InputError: when the dense model or the settings are not supported.
        """
        config = vllm_config.model_config.hf_config
        architecture = dense_class_of(config.dense_config).__name__
        dense_config = vllm_config.with_hf_config(config.dense_config, architectures=[architecture])
        dense_class, _ = get_model_architecture(dense_config.model_config)
        check_class(dense_class, dense_config)
        its_own = type(f"TopKExperts{dense_class.__name__}", (SparseHeadMixin, dense_class), {})
        model: Any = initialize_model(vllm_config=dense_config, prefix=prefix, model_class=its_own)
        model.take_converted_head(vllm_config)
        return model

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Never called: instances are of another class."""

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed token ids."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Run the decoder."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Compute the logits of all tokens."""
        raise NotImplementedError


def check_class(dense_class: type[nn.Module], dense_config: VllmConfig) -> None:
    """Refuse a dense class that supports other things than vLLM infers from [`TopKExpertsForCausalLM`].

    Args:
        dense_class: vLLM's class of the dense model.
        dense_config: vLLM's configuration, with the dense model's.

    Raises:
        InputError: when it has a recurrent state, takes images, has settings of its own in vLLM, or does not run in the
            pipeline that was asked for.
    """
    config = dense_config.model_config.hf_config
    name = config.architectures[0]
    instead = "run it with Transformers, or serve the dense checkpoint"
    if has_inner_state(dense_class) or is_hybrid(dense_class) or is_attention_free(dense_class):
        raise InputError(f"{name} has a state besides the KV cache, which hf-topk does not serve: {instead}")
    if supports_multimodal(dense_class):
        raise InputError(f"{name} takes images, which hf-topk does not serve: {instead}")
    if name in MODELS_CONFIG_MAP or config.model_type in MODEL_ARCH_CONFIG_CONVERTORS:
        raise InputError(f"vLLM has settings of its own for {name}, which hf-topk does not serve: {instead}")
    if dense_config.parallel_config.pipeline_parallel_size > 1 and not supports_pp(dense_class):
        raise InputError(f"{name} does not run as a pipeline: leave --pipeline-parallel-size out")


def check_settings(vllm_config: VllmConfig) -> None:
    """Refuse settings that the sparse head does not support.

    Args:
        vllm_config: vLLM's configuration, with the converted model's.

    Raises:
        InputError: when the head's dtype is not the model's, or another converted model drafts.
    """
    model_config, speculative = vllm_config.model_config, vllm_config.speculative_config
    if model_config.head_dtype != model_config.dtype:
        raise InputError(
            f"head_dtype is {model_config.head_dtype}, and the sparse head computes in {model_config.dtype}: "
            f"leave head_dtype out, or {WITHOUT_SPARSE_HEAD}"
        )
    draft = None if speculative is None else speculative.draft_model_config
    drafts_sparse = draft is not None and draft.hf_config.model_type == TopKExpertsConfig.model_type
    if drafts_sparse and draft is not model_config:
        raise InputError(
            f"the draft tokens of a converted model are verified with the dense head: {WITHOUT_SPARSE_HEAD}"
        )


def find_head(model: Any, config: TopKExpertsConfig) -> VocabParallelEmbedding:
    """Find the head's layer, which may also be that of the input embeddings.

    Args:
        model: a model of vLLM's.
        config: the converted model's configuration.

    Raises:
        InputError: when there is no such layer, or it is quantised.
    """
    size = (config.dense_config.get_text_config().vocab_size, config.hidden_size)
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, VocabParallelEmbedding) and (layer.num_embeddings, layer.embedding_dim) == size
    ]
    heads = [layer for layer in layers if isinstance(layer, ParallelLMHead)] or layers
    if len(heads) != 1:
        raise InputError(f"{type(model).__name__} has {len(heads)} vocabulary heads, not one: {WITHOUT_SPARSE_HEAD}")
    if not isinstance(heads[0].quant_method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)):
        raise InputError(f"the vocabulary head is quantised, which hides its rows: {WITHOUT_SPARSE_HEAD}")
    return heads[0]
