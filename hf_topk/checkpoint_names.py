"""How the tensors of a converted model are called on disk: as the dense model calls them."""

from collections.abc import Iterable

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
            under: the first renaming of all, after which names are those of the dense model under its prefix.
            known: names that the model has.
        """
        self.under, self.known = under, set(known)
        super().__init__("^$", "")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name as it is, if the model has it or did not have it either before it was changed."""
        before = self.under.latest
        return (before if before in self.known and source_key not in self.known else source_key), None
