"""The converted model: the dense model with its head replaced."""

import copy
import inspect
from contextlib import ExitStack, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_outputs import CausalLMOutputWithPast

from .assistant import AssistantMixin, SharedTokens
from .checkpoint_names import DenseNamesMixin, NamesUnder
from .compiled_decoder import CompiledDecoderMixin
from .configuration_topk_experts import HeadMode, TopKExpertsConfig
from .dense_model import (
    ANSWERED_AS_THE_DENSE_CLASS,
    DensePartsMixin,
    dense_class_of,
    generate_as,
    mark_as_quantised,
    name_of_head,
    random_dense_model,
)
from .drafting import drafting_pays, verification
from .errors import InputError
from .head import HEAD_MODES, TopKExpertsHead
from .hub_card import KeepsCard
from .joint_training import JointTrainingMixin
from .logits_processors import adapt
from .lossless import LosslessStats, generating, is_lossless_generation, sample
from .sharing import copy_sharing
from .ties import settle_ties
from .token_chooser import TokenChooser, can_choose
from .whole_head import WholeHeadMixin

REPOSITORY_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class TopKExpertsPreTrainedModel(KeepsCard):
    """Loading and initialisation of converted models; see [`TopKExpertsForCausalLM`]."""

    config_class = TopKExpertsConfig
    base_model_prefix = "base"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True


class TopKExpertsForCausalLM(
    WholeHeadMixin,
    JointTrainingMixin,
    AssistantMixin,
    CompiledDecoderMixin,
    DensePartsMixin,
    DenseNamesMixin,
    TopKExpertsPreTrainedModel,
    GenerationMixin,
):
    """A dense causal language model whose output head reads only the experts its router picks.

    `base` is the dense model, with its head replaced by a [`TopKExpertsHead`] on the same weight. So soft-capping,
    logit scales, losses and caches are the dense model's own. Its tensors keep their dense names on disk.

    Attributes:
        base: the dense model.
        head: the [`TopKExpertsHead`] in it.
        last_generation_stats: statistics of the last `generate` if it was lossless and drafted tokens, else None.

    Examples:
        >>> import hf_topk
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained("out")
        >>> inputs = AutoTokenizer.from_pretrained("out")("Once upon a time", return_tensors="pt")
        >>> tokens = model.generate(**inputs, max_new_tokens=8, lossless=True)
        >>> model.head_mode = "dense"
        >>> bool((model.generate(**inputs, max_new_tokens=8) == tokens).all())
        True
    """

    config: TopKExpertsConfig
    base: PreTrainedModel
    last_generation_stats: LosslessStats | None = None
    auto_class: str = "AutoModelForCausalLM"  # loads this class
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012  # the dense model's own apply, which peft looks for
    _no_split_modules = ["TopKExpertsHead"]  # noqa: RUF012  # Transformers' type; device maps keep the head together

    def __init__(self, config: TopKExpertsConfig) -> None:
        """Build the model with random dense weights, and with the head's additions unset.

        Args:
            config: the converted model's configuration.

        Raises:
            InputError: when `config` is a dense model's, or the dense model has no single linear vocabulary head.
        """
        # By model type, not class: remote code may load the class twice.
        if type(config).model_type != TopKExpertsConfig.model_type:
            raise InputError(
                f"a {type(config).__name__} is a dense model's configuration, not a converted model's: "
                "convert the model first with `hf-topk convert MODEL OUT`"
            )
        dense_class = dense_class_of(config.dense_config)
        for name in ANSWERED_AS_THE_DENSE_CLASS:
            setattr(self, name, getattr(dense_class, name, None))
        super().__init__(config)
        self.check_class(dense_class)
        self._adopt(random_dense_model(config.dense_config))
        self.post_init()

    def _adopt(self, dense: PreTrainedModel) -> None:
        self.base = dense
        self.config.text_config = dense.config
        # The head is not registered as a module here: it is a module of the dense model.
        self.head_name = name_of_head(dense)
        head = TopKExpertsHead(cast(nn.Linear, dense.get_submodule(self.head_name)), self.config)
        dense.set_submodule(self.head_name, head)
        generate_as(self, dense)
        self._keeps_logits = "logits_to_keep" in inspect.signature(dense.forward).parameters

    def initialize_weights(self) -> None:
        """Initialise tensors that were not loaded: the dense model by its own method, then the head's additions."""
        # Not by `super()`: for classes outside Transformers it skips modules without tensors of their own.
        self.base.initialize_weights()
        self.head.reset_additions()

    @classmethod
    def from_dense(cls, dense: PreTrainedModel, config: TopKExpertsConfig) -> "TopKExpertsForCausalLM":
        """Wrap a dense model in memory; its tensors are shared, and the model is not changed.

        Args:
            dense: the dense model.
            config: the converted model's configuration; its `text_config` is replaced by the dense model's.

        Returns:
            A model in evaluation mode, whose router and tail are unset, in fp32.

        Raises:
            InputError: when the dense model has no single linear vocabulary head, Transformers would not load it as its
                class, or would not reload it with head and input embeddings tied as they are.
        """
        name_of_head(dense)
        hooks = [module._hf_hook for module in dense.modules() if hasattr(module, "_hf_hook")]  # of accelerate
        twin = copy_sharing(dense, (*dense.parameters(), *dense.buffers(), *hooks))
        twin.config.architectures = [type(dense).__name__]
        if not isinstance(dense, dense_class_of(twin.config)):
            raise InputError(
                f"Transformers does not load a '{dense.config.model_type}' as {type(dense).__name__} to generate text: "
                "load the model with AutoModelForCausalLM"
            )
        settle_ties(twin)
        config.text_config = twin.config
        config.dtype = twin.config.dtype = dense.dtype
        with torch.device("meta"):
            model = cls(config)
        model._adopt(twin)
        model.head.to(model.head.weight.device)
        if hooks:  # accelerate may have put the decoder on another device
            model.head.register_forward_pre_hook(_to_device_of_head)
        model.tie_weights()
        model.generation_config = copy.deepcopy(dense.generation_config)
        mark_as_quantised(model, dense)
        return model.eval()

    @property
    def head(self) -> TopKExpertsHead:
        """The output head.

        Raises:
            InputError: when something else, such as an adapter, was put around it.
        """
        head = self.base.get_submodule(self.head_name)
        if not isinstance(head, TopKExpertsHead):
            raise InputError(
                f"there is a {type(head).__module__}.{type(head).__name__} around the head, to which router and tail "
                "are not fitted: merge it first (in peft: merge_and_unload), or exclude the head from its targets"
            )
        return head

    @property
    def head_mode(self) -> HeadMode:
        """The head mode: "auto", "sparse" or "dense"; an entry of the configuration, as are the properties below."""
        return self.config.head_mode

    @head_mode.setter
    def head_mode(self, mode: HeadMode) -> None:
        if mode not in HEAD_MODES:
            raise InputError(f"unknown head mode '{mode}': choose one of {', '.join(HEAD_MODES)}")
        self.config.head_mode = mode

    @property
    def num_experts_per_tok(self) -> int:
        """k, the number of experts picked per position: from 1 to all."""
        return self.config.num_experts_per_tok

    @num_experts_per_tok.setter
    def num_experts_per_tok(self, count: int) -> None:
        self.config.num_experts_per_tok = count

    @property
    def num_rescored(self) -> int:
        """R, the number of the picked experts' tokens that get exact logits, the likeliest by the screen."""
        return self.config.num_rescored

    @num_rescored.setter
    def num_rescored(self, count: int) -> None:
        self.config.num_rescored = count

    @property
    def sparse_max_positions(self) -> int | None:
        """The largest number of positions (batch x sequence) that head mode "auto" runs sparse; None to measure it."""
        return self.config.sparse_max_positions

    @sparse_max_positions.setter
    def sparse_max_positions(self, count: int | None) -> None:
        self.config.sparse_max_positions = count

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the dense model with the replaced head; arguments and outputs are the dense model's.

        Args:
            input_ids: token ids, [B, T].
            attention_mask: 1 for tokens to attend to, [B, T].
            position_ids: positions of the tokens, [B, T].
            past_key_values: the KV cache of earlier tokens.
            inputs_embeds: embeddings in place of `input_ids`, [B, T, d].
            labels: token ids to compute the loss on, -100 to ignore a position, [B, T].
            use_cache: whether to return the KV cache.
            logits_to_keep: number of last positions to compute logits for; 0 for all.
            **kwargs: further arguments of the dense model.

        Returns:
            The dense model's output, with logits [B, T or `logits_to_keep`, V].

        Raises:
            InputError: when an adapter was put around a head that is tied to the input embeddings.
        """
        self.check_tied_ends()
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if self._keeps_logits:  # `generate` passes it even if the dense model does not accept it
            given["logits_to_keep"] = logits_to_keep
        return self.base(**given, **kwargs)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        lossless: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as Transformers does; see there for all else.

        Args:
            inputs: the prompt, [B, T].
            generation_config: of the generation; may have an entry `lossless`.
            *args: further arguments of Transformers' `generate`.
            lossless: whether to return the tokens of dense decoding, when sampling those with the same seed. The dense
                head runs once per block of tokens; in beam search and assisted decoding, and if the KV cache cannot be
                cropped, once per token. Statistics of drafting are in `last_generation_stats`. None takes the entry of
                the generation config.
            **kwargs: further arguments of Transformers' `generate`.

        Raises:
            InputError: when `lossless` is not true or false.
        """
        self.last_generation_stats = None
        head = self.head
        with ExitStack() as stack:
            shared_tokens = stack.enter_context(self._drafting_for(generation_config))
            is_lossless = self._asks_for_lossless(lossless, generation_config) and shared_tokens is None
            stack.enter_context(generating(is_lossless=is_lossless))
            if (replacement := head.fastest_dense_logits if is_lossless else shared_tokens) is not None:
                stack.enter_context(head.replaced_by(replacement))
                if self._is_compiled:  # compiled code ignores replacements; this affects all threads
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
            return cast(Any, super()).generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare the inputs of a decode step as the dense model does."""
        inputs = cast(Any, self.base).prepare_inputs_for_generation(*args, **kwargs)
        if isinstance(shared_tokens := self.head.replacement, SharedTokens):
            inputs["input_ids"] = shared_tokens.own_ids(inputs["input_ids"])
        return inputs

    def _asks_for_lossless(self, lossless: bool | None, *configs: GenerationConfig | None) -> bool:
        for config in (*configs, self.generation_config):
            lossless = getattr(config, "lossless", None) if lossless is None else lossless
        if lossless not in (None, True, False):
            raise InputError(f"lossless is {lossless!r}, must be true or false")
        return bool(lossless)

    @property
    def _is_compiled(self) -> bool:
        """Whether the head or a module around it was compiled."""
        path = f"{self.base_model_prefix}.{self.head_name}"
        return any(
            module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
            for name, module in self.named_modules()
            if path.startswith(name)
        )

    def _sample(  # type: ignore[override]  # only these by name: other arguments differ between versions
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        head, arguments = self.head, (input_ids, logits_processor, stopping_criteria, generation_config)
        if is_lossless_generation.get():
            verify = verification(head, logits_processor, generation_config)
            if drafting_pays(head, len(input_ids), verify):
                result, stats = sample(self, *arguments, verify, **kwargs)
                self.last_generation_stats = stats + (self.last_generation_stats or LosslessStats())
                return result
        elif head.replacement is None and can_choose(head, logits_processor, generation_config):
            chooser = TokenChooser(head, logits_processor, generation_config.do_sample)
            takes_the_best = copy.copy(generation_config)
            takes_the_best.do_sample = False
            with head.replaced_by(chooser.logits):
                return cast(Any, super())._sample(input_ids, chooser, stopping_criteria, takes_the_best, **kwargs)
        return cast(Any, super())._sample(*arguments, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        found = cast(Any, super())._get_logits_processor(*args, **kwargs)
        return found if is_lossless_generation.get() else adapt(found)

    def init_continuous_batching(self, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Start continuous batching as Transformers does; raises an InputError if lossless decoding is asked for."""
        if self.head_mode != "dense" and (
            is_lossless_generation.get() or self._asks_for_lossless(None, generation_config)
        ):
            raise InputError("continuous batching is not lossless: generate without it, or set head_mode to 'dense'")
        return cast(Any, super()).init_continuous_batching(generation_config, *args, **kwargs)

    def adjust_generation_fn(  # type: ignore[override]  # Transformers passes the first four by position
        self, generation_config: Any, from_auto: Any, from_pipeline: Any, name: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Load the generation config, with its entry `lossless` if any."""
        cast(Any, super()).adjust_generation_fn(generation_config, from_auto, from_pipeline, name, *args, **kwargs)
        self._revision = str(kwargs.get("revision") or "main")  # for the model card
        config = self.generation_config
        if config is None or not config._from_model_config or generation_config is not None or name is None:
            return
        # From generation configs that it once derived from a model's configuration, Transformers drops unknown entries.
        where = {argument: kwargs[argument] for argument in REPOSITORY_ARGUMENTS if argument in kwargs}
        with suppress(OSError):  # there may be no such file
            entries = GenerationConfig.from_pretrained(name, **where, _from_model_config=False)
            if hasattr(entries, "lossless"):
                config.lossless = entries.lossless  # type: ignore[attr-defined]


def _to_device_of_head(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(cast(Tensor, head.weight).device) for tensor in inputs)


# Registered in this file, not in the package, so that it works as remote code, too.
register_checkpoint_conversion_mapping(
    TopKExpertsConfig.model_type, [NamesUnder(TopKExpertsPreTrainedModel.base_model_prefix)], overwrite=True
)
