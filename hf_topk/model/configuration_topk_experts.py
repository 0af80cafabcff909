"""Configuration of a converted model: the dense model's own configuration plus what its head was split into."""

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .errors import InputError

if TYPE_CHECKING:
    # Never imported from here, but Transformers reads it off these lines which code is of one version, where it is
    # loaded from a folder: two folders of two versions in one process would else run the code of the first.
    from .encoder_decoder import TopKExpertsForSeq2SeqLM  # noqa: F401
    from .modeling_topk_experts import TopKExpertsForCausalLM  # noqa: F401

CombineType = Literal["exact", "router", "learned"]
HeadMode = Literal["auto", "sparse", "dense"]

# Which other code asks of any model's configuration, or sets. Not all: Transformers checks and saves what it finds.
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
# Which any configuration has, and the dense model reads off its own.
SET_IN_BOTH = ("output_attentions", "output_hidden_states")


@strict
class TopKExpertsConfig(PreTrainedConfig):
    r"""Configuration of a [`TopKExpertsForCausalLM`].

    Args:
        text_config: configuration of the dense model, or a dictionary of it with its `model_type`.
        num_experts: M, the number of experts that share out the routed vocabulary.
        expert_size: S, the number of token ids in each expert.
        num_experts_per_tok: k, the number of experts scored for a position, from 1 to M.
        num_always_on: A, the number of token ids scored at every position.
        router_rank: numbers kept of an expert's row of the router, a third of a byte each.
        router_packed: whether these are all that is kept; the rows are floats where not.
        tail_rank: numbers kept of a token's row, a third of a byte each, to screen the tokens of the picked experts.
        num_rescored: R, how many of these tokens get exact logits: those that the screen has for the likeliest. The
            others keep its estimates, and tokens of other experts share their expert's score by a fixed prior.
        combine: how a scored token's logit is made: `exact` is the dense logit, `router` puts the router's estimate in
            place of the expert's own mass, `learned` goes as far between the two as distillation found best. These two
            score all tokens of the picked experts, without a screen.
        head_mode: `sparse`, `dense`, or `auto`: sparse where that is faster, dense elsewhere and whenever gradients
            are on.
        sparse_max_positions: the largest number of positions (batch x sequence) of a call that `auto` runs sparse; None
            measures at first use, where the model runs, how many positions the sparse head is the faster one for.

    `head_mode`, `num_experts_per_tok`, `num_rescored` and `sparse_max_positions` can be changed on a loaded model, here
    or at the model. The other entries say what it was converted to.

    Raises:
        StrictDataclassError: when a value is of a wrong type or out of range.
        InputError: when loaded from a folder whose `model_type` is another one, and when one of the four is set out of
            range later on.

    Example:
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
        """`text_config`, which is a configuration once this one is made."""
        return cast(PreTrainedConfig, self.text_config)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether head and input embeddings are one tensor, as the dense model has it."""
        return bool(getattr(self.dense_config, "tie_word_embeddings", False))

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, are_tied: bool) -> None:
        self.dense_config.tie_word_embeddings = are_tied

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The part of the dense model's configuration that is about text, as its own `get_text_config` has it."""
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
        """Check what can be changed on a loaded model, whose head reads it from here."""
        if not isinstance(value, int):  # of another type: refused with all that are of a wrong one
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
        """All entries, with ties of embeddings, and in `text_config` the body's quantisation, where tools look."""
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
            **kwargs: entries in place of those, of this configuration or of the dense model's.

        Returns:
            The configuration; with `return_unused_kwargs` also those entries that neither has.
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
            InputError: when it is another model type's, such as a dense model's.
        """
        config_dict, unused = super().get_config_dict(*args, **kwargs)
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise InputError(
                f"{args[0]} is a dense checkpoint (model type '{found}'), not a converted model: "
                "convert it with `hf-topk convert MODEL OUT`, or load it with AutoModelForCausalLM"
            )
        return config_dict, unused
