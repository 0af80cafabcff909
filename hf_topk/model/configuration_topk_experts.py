"""Configuration of a converted model: the dense model's configuration, and the sizes of its sparse head."""

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .errors import InputError

if TYPE_CHECKING:
    # Never imported at run time. Transformers reads these lines to find which files belong together in remote code;
    # without them, two folders of different versions in one process would both run the code of the first.
    from .encoder_decoder import TopKExpertsForSeq2SeqLM  # noqa: F401
    from .modeling_topk_experts import TopKExpertsForCausalLM  # noqa: F401

CombineType = Literal["exact", "router", "learned"]
HeadMode = Literal["auto", "sparse", "dense"]

# Entries that other code reads or sets in any configuration. Not all: Transformers checks and saves those it finds.
AS_IN_THE_DENSE_MODEL = (
    "audio_token_id",
    "hidden_size",
    "image_token_id",
    "max_position_embeddings",
    "max_source_positions",
    "num_attention_heads",
    "num_hidden_layers",
    "use_cache",
    "video_token_id",
    "vocab_size",
)
# Entries that every configuration has, and that the dense model reads from its own.
SET_IN_BOTH = ("output_attentions", "output_hidden_states")


@strict
class TopKExpertsConfig(PreTrainedConfig):
    r"""Configuration of a [`TopKExpertsForCausalLM`].

    Args:
        text_config: configuration of the dense model, or a dictionary of it with its `model_type`.
        num_experts: M, the number of experts into which the routed vocabulary is split.
        expert_size: S, the number of token ids per expert.
        num_experts_per_tok: k, the number of experts picked per position, from 1 to M.
        num_always_on: A, the number of token ids scored at every position.
        router_rank: numbers kept per row of the packed router, a third of a byte each.
        router_packed: whether the router's rows are packed; otherwise they are floats.
        tail_rank: numbers kept per token, a third of a byte each, to screen the tokens of the picked experts.
        num_rescored: R, the number of these tokens that get exact logits, the likeliest by the screen. The others keep
            the screen's estimates, and tokens of other experts share their expert's score by a fixed prior.
        combine: how the logit of a scored token is computed: `exact` is the dense logit, `router` replaces the mass of
            the expert by the router's estimate, `learned` interpolates between the two as distilled. The latter two
            score all tokens of the picked experts, without a screen.
        head_mode: `sparse`, `dense`, or `auto`: sparse where that is faster, otherwise dense, as whenever gradients
            are enabled.
        sparse_max_positions: the largest number of positions (batch x sequence) per call that `auto` runs sparse; None
            measures at first use up to how many positions the sparse head is faster on this machine.

    `head_mode`, `num_experts_per_tok`, `num_rescored` and `sparse_max_positions` can be changed on a loaded model, here
    or on the model. The other entries are fixed by the conversion.

    Raises:
        StrictDataclassError: when a value has the wrong type or is out of range.
        InputError: when loaded from a folder with another `model_type`, or when one of these four is set out of range.

    Examples:
        >>> from hf_topk import TopKExpertsConfig
        >>> config = TopKExpertsConfig(num_experts=3056, num_experts_per_tok=527)
        >>> config.num_experts_per_tok = 4000
        Traceback (most recent call last):
        hf_topk.model.errors.InputError: num_experts_per_tok is 4000, must be from 1 to the 3056 experts
    """

    model_type = "topk_experts"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - a class attribute of PreTrainedConfig, never mutated

    text_config: PreTrainedConfig | dict[str, Any] | None = None
    num_experts: int = 8
    expert_size: int = 16
    num_experts_per_tok: int = 2
    num_always_on: int = 0
    router_rank: int = 384
    router_packed: bool = False
    tail_rank: int = 288
    num_rescored: int = 256
    combine: CombineType = "exact"
    head_mode: HeadMode = "auto"
    sparse_max_positions: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the dense model's configuration from its dictionary."""
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        elif isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        else:  # a copy: what Transformers sets on a sub-configuration must not reach the dense model
            self.text_config = copy.deepcopy(self.text_config)
        super().__post_init__(**kwargs)
        for name in filter(partial(getattr, self), SET_IN_BOTH):
            setattr(self.dense_config, name, getattr(self, name))

    @property
    def dense_config(self) -> PreTrainedConfig:
        """`text_config`, which is a configuration after initialisation."""
        return cast(PreTrainedConfig, self.text_config)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether head and input embeddings are tied, as in the dense model."""
        return bool(getattr(self.dense_config, "tie_word_embeddings", False))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, are_tied: bool) -> None:
        self.dense_config.tie_word_embeddings = are_tied

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The text part of the dense model's configuration, by its own `get_text_config`."""
        return self.dense_config.get_text_config(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in AS_IN_THE_DENSE_MODEL and "text_config" in self.__dict__:
            return getattr(self.dense_config, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        dense_config = self.__dict__.get("text_config")
        is_made = isinstance(dense_config, PreTrainedConfig)
        if is_made:
            self._check_setting(name, value)
        if is_made and name in (*AS_IN_THE_DENSE_MODEL, *SET_IN_BOTH):
            setattr(dense_config, name, value)
        if not (is_made and name in AS_IN_THE_DENSE_MODEL):
            super().__setattr__(name, value)
        if name == "text_config" and isinstance(value, PreTrainedConfig):
            self.is_encoder_decoder = value.is_encoder_decoder

    def _check_setting(self, name: str, value: Any) -> None:
        """Check entries that can be changed on a loaded model, whose head reads them here."""
        if not isinstance(value, int):  # wrong types are refused by `strict`
            return
        if name == "num_experts_per_tok" and not 1 <= value <= self.num_experts:
            raise InputError(f"num_experts_per_tok is {value}, must be from 1 to the {self.num_experts} experts")
        if name == "num_rescored" and value < 1:
            raise InputError(f"num_rescored is {value}, must be at least 1")
        if name == "sparse_max_positions" and value < 0:
            raise InputError(f"sparse_max_positions is {value}, cannot be negative")

    def validate_head(self) -> None:
        """Check the sizes against one another.

        Raises:
            ValueError: when a size is out of range.
        """
        for name in ("num_experts", "expert_size", "router_rank", "tail_rank", "num_rescored"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` must be from 1 to `num_experts` ({self.num_experts}), "
                f"got {self.num_experts_per_tok}"
            )
        if self.num_always_on < 0 or (self.sparse_max_positions or 0) < 0:
            raise ValueError("`num_always_on` and `sparse_max_positions` cannot be negative")

    def to_dict(self) -> dict[str, Any]:
        """All entries, with `tie_word_embeddings`, and with the quantisation in `text_config`, where tools look."""
        entries = {**super().to_dict(), "tie_word_embeddings": self.tie_word_embeddings}
        entries["text_config"].pop("quantization_config", None)
        if "quantization_config" in entries:
            entries["text_config"]["quantization_config"] = entries["quantization_config"]
        return entries

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration, as [`PreTrainedConfig.from_dict`] does.

        Args:
            config_dict: its entries.
            **kwargs: entries to override, in this configuration or the dense model's.

        Returns:
            The configuration; with `return_unused_kwargs` also the entries that neither has.
        """
        returns_unused = kwargs.pop("return_unused_kwargs", False)
        made: Any = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        config, unused = made
        for name in [name for name in unused if hasattr(config.dense_config, name)]:
            setattr(config.dense_config, name, unused.pop(name))
        return (config, unused) if returns_unused else config

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a folder's or repository's configuration, as [`PreTrainedConfig.get_config_dict`] does.

        Raises:
            InputError: when its model type is another one, such as a dense model's.
        """
        config_dict, unused = super().get_config_dict(*args, **kwargs)
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise InputError(
                f"{args[0]} is a dense checkpoint (model type '{found}'), not a converted model: "
                "convert it with `hf-topk convert MODEL OUT`, or load it with AutoModelForCausalLM"
            )
        return config_dict, unused
