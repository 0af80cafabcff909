"""The names of a converted model's tensors on disk, which are the dense model's."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import PrefixChange, WeightRenaming


class NamesUnder(WeightRenaming):
    """Load checkpoint names under a prefix, and save them without it again.

    Not a [`PrefixChange`]: Transformers skips those when it saves a model that was built in memory.
    """

    __slots__ = ("added", "latest", "parent")

    def __init__(self, added: str, parent: str | None = None, but_not: tuple[str, ...] = ()) -> None:
        """Define the renaming.

        Args:
            added: the prefix to add.
            parent: the module below which to add it; None for the model itself.
            but_not: first parts of names to leave unchanged, besides `added`.
        """
        self.added, self.parent = added, parent
        self.latest = ""
        start = "" if parent is None else rf"{parent}\."
        stay = "|".join((added, *but_not))
        super().__init__(rf"^{start}(?!(?:{stay})\.)(.+)$", rf"{start}{added}\.\1")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Rename, and store the result in `latest`."""
        self.latest, matched = super().rename_source_key(source_key)
        return self.latest, matched

    def reverse_transform(self) -> WeightRenaming:
        """Remove the prefix."""
        return PrefixChange(prefix_to_remove=self.added, model_prefix=self.parent)


class NamesThatFit(WeightRenaming):
    """Restore names that were valid before the dense model's renamings for older checkpoints changed them.

    Transformers does so for a dense model: where a renamed key matches no tensor, it keeps the original key.
    """

    __slots__ = ("known", "under")

    def __init__(self, under: NamesUnder, known: Iterable[str]) -> None:
        """Define which names are valid.

        Args:
            under: the renaming that adds the dense model's prefix. Transformers applies all renamings to one name
                before the next, so its `latest` belongs to the name passed here.
            known: names of the model's tensors.
        """
        self.under, self.known = under, set(known)
        super().__init__("^$", "")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The original name if only that is valid, else the renamed one."""
        before = self.under.latest
        return (before if before in self.known and source_key not in self.known else source_key), None


class DenseNamesMixin:
    """Loads checkpoints with any tensor names that the dense model's class can load."""

    base: PreTrainedModel
    base_model_prefix: str

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not (args or kwargs):  # otherwise an adapter, with the converted model's names
            load_config = dataclasses.replace(load_config, weight_mapping=_as_dense_names(model, load_config))
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        # The dense class's patterns match names without our prefix, and without its own if the checkpoint has none.
        for prefix in (f"{self.base_model_prefix}.", f"{self.base_model_prefix}.{self.base.base_model_prefix}."):
            by_bare = [
                {name.removeprefix(prefix): name for name in names}
                for names in (loading_info.missing_keys, loading_info.unexpected_keys)
            ]
            bare = dataclasses.replace(loading_info, missing_keys=set(by_bare[0]), unexpected_keys=set(by_bare[1]))
            self.base._adjust_missing_and_unexpected_keys(bare)
            loading_info.missing_keys = {by_bare[0][name] for name in bare.missing_keys}
            loading_info.unexpected_keys = {by_bare[1][name] for name in bare.unexpected_keys}


def _as_dense_names(model: Any, load_config: Any) -> list[Any]:
    """The renamings of a checkpoint, with those for names older or newer than the dense class's."""
    mapping = list(load_config.weight_mapping)
    # By attribute, not class: remote code may load the class twice. A user's own mapping comes first.
    under = next(renaming for renaming in mapping if hasattr(renaming, "latest"))
    # Some dense checkpoints (GPT-2, BLOOM) use the tensor names of the model without a head.
    dense = model.base
    if dense.base_model is not dense:
        children = tuple(name for name, _ in dense.named_children() if name != dense.base_model_prefix)
        mapping.append(NamesUnder(dense.base_model_prefix, parent=model.base_model_prefix, but_not=children))
    return [*mapping, NamesThatFit(under, model.state_dict())]
