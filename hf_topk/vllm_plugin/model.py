"""The model class that vLLM finds for a converted model: the dense model's own, with another way to make logits."""

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
    """What a class of vLLM's gets to run a converted model: its head is replaced once it is made.

    Attributes:
        sparse_head: how logits are made; None where the head runs dense, and on ranks of a pipeline that have no head.
    """

    sparse_head: SparseHeadMethod | None
    names_added: frozenset[str]

    def take_converted_head(self, vllm_config: VllmConfig) -> None:
        """Make logits with a sparse head from now on, unless head mode is "dense".

        Args:
            vllm_config: vLLM's configuration, of which the model's is that of the converted model.

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
        """Load a converted checkpoint: the dense model's tensors as its class does, then what conversion added.

        Raises:
            InputError: when the checkpoint is damaged, or its added shard is not of this model.
        """
        additions = Additions(self.names_added)
        loaded: set[str] | None = super().load_weights(additions.set_aside(weights))  # type: ignore[misc]
        if self.sparse_head is not None:
            additions.load_into(self.sparse_head.head)
        return loaded


class TopKExpertsForCausalLM(nn.Module, SupportsPP):
    """The class that `config.json` names; what it makes is of the dense model's class, so that names stay the same.

    vLLM asks this class, before there is a configuration, what a converted model can do. Its methods say just that.
    """

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """Make the dense model with its head replaced.

        Raises:
            InputError: when vLLM cannot run the dense model this way.
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
        """Never called: what is made is of another class."""

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
        """Make logits of all tokens."""
        raise NotImplementedError


def check_class(dense_class: type[nn.Module], dense_config: VllmConfig) -> None:
    """Check that vLLM, which asked [`TopKExpertsForCausalLM`] in its place, was told right what the dense class can do.

    Args:
        dense_class: vLLM's class of the dense model.
        dense_config: vLLM's configuration, with the dense model's own.

    Raises:
        InputError: when it was not.
    """
    config = dense_config.model_config.hf_config
    name = config.architectures[0]
    instead = "run it with Transformers, or serve the dense checkpoint"
    if has_inner_state(dense_class) or is_hybrid(dense_class) or is_attention_free(dense_class):
        raise InputError(f"{name} keeps a state beside the KV cache, which hf-topk does not serve: {instead}")
    if supports_multimodal(dense_class):
        raise InputError(f"{name} looks at images, which hf-topk does not serve: {instead}")
    if name in MODELS_CONFIG_MAP or config.model_type in MODEL_ARCH_CONFIG_CONVERTORS:
        raise InputError(f"vLLM sets itself up for {name} by its name alone, which hf-topk does not serve: {instead}")
    if dense_config.parallel_config.pipeline_parallel_size > 1 and not supports_pp(dense_class):
        raise InputError(f"{name} does not run as a pipeline: leave --pipeline-parallel-size out")


def check_settings(vllm_config: VllmConfig) -> None:
    """Check what the sparse head cannot be combined with.

    Raises:
        InputError: when it was asked for.
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
        raise InputError(f"what a converted model drafts is verified with the dense head: {WITHOUT_SPARSE_HEAD}")


def find_head(model: Any, config: TopKExpertsConfig) -> VocabParallelEmbedding:
    """Find the layer that makes logits, which is the one for input embeddings where a model has it for both.

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
