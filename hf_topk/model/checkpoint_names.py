"""How the tensors of a converted model are called on disk: as the dense model calls them."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import PrefixChange, WeightRenaming


class NamesUnder(WeightRenaming):
    """Load checkpoint names under a prefix, and save them without it again.

    [`PrefixChange`] would do, but Transformers leaves those out when a model made in memory is saved.
    """

    __slots__ = ("added", "latest", "parent")

    def __init__(self, added: str, parent: str | None = None, but_not: tuple[str, ...] = ()) -> None:
        """Say where names go.

        Args:
            added: the prefix to add.
            parent: the module under which names are to have it; None for the model itself.
            but_not: first parts of names that stay as they are, beside `added`.
        """
        self.added, self.parent = added, parent
        self.latest = ""
        start = "" if parent is None else rf"{parent}\."
        stay = "|".join((added, *but_not))
        super().__init__(rf"^{start}(?!(?:{stay})\.)(.+)$", rf"{start}{added}\.\1")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Rename, and keep the name as `latest`."""
        self.latest, matched = super().rename_source_key(source_key)
        return self.latest, matched

    def reverse_transform(self) -> WeightRenaming:
        """Take the prefix away."""
        return PrefixChange(prefix_to_remove=self.added, model_prefix=self.parent)


class NamesThatFit(WeightRenaming):
    """Give names back that were right before the dense model's renamings for older checkpoints changed them.

    Transformers does so for a dense model: a name that fits nothing once it is changed stays as it was.
    """

    __slots__ = ("known", "under")

    def __init__(self, under: NamesUnder, known: Iterable[str]) -> None:
        """Say which names are right.

        Args:
            under: the renaming after which names are those of the dense model under its prefix. Transformers takes one
                name through all renamings in turn before the next, so its `latest` is of the name that comes here.
            known: names that the model has.
        """
        self.under, self.known = under, set(known)
        super().__init__("^$", "")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name as it is, if the model has it or did not have it either before it was changed."""
        before = self.under.latest
        return (before if before in self.known and source_key not in self.known else source_key), None


class DenseNamesMixin:
    """Loads checkpoints whose names are those that the dense model's class knows."""

    base: PreTrainedModel
    base_model_prefix: str

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not (args or kwargs):  # else it is an adapter, whose names are those of the converted model
            load_config = dataclasses.replace(load_config, weight_mapping=_as_dense_names(model, load_config))
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        # The dense class's patterns are for names without the prefix, and without its own where there was none on disk.
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
    """The renamings of a checkpoint, with those for names that are older or newer than the dense class's."""
    mapping = list(load_config.weight_mapping)
    # By what it has: code that is loaded from a repository may have the class twice. A user's own mapping comes first.
    under = next(renaming for renaming in mapping if hasattr(renaming, "latest"))
    # Some dense checkpoints (GPT-2, BLOOM) name their tensors as the model without a head does.
    dense = model.base
    if dense.base_model is not dense:
        children = tuple(name for name, _ in dense.named_children() if name != dense.base_model_prefix)
        mapping.append(NamesUnder(dense.base_model_prefix, parent=model.base_model_prefix, but_not=children))
    return [*mapping, NamesThatFit(under, model.state_dict())]
