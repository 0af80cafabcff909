"""How the tensors of a converted model are called on disk: as the dense model calls them."""

from transformers.core_model_loading import PrefixChange, WeightRenaming


class NamesUnder(WeightRenaming):
    """Load checkpoint names under a prefix, and save them without it again.

    [`PrefixChange`] would do, but Transformers leaves those out when a model made in memory is saved.
    """

    __slots__ = ("added", "parent")

    def __init__(self, added: str, parent: str | None = None, but_not: tuple[str, ...] = ()) -> None:
        """Say where names go.

        Args:
            added: the prefix to add.
            parent: the module under which names are to have it; None for the model itself.
            but_not: first parts of names that stay as they are, beside `added`.
        """
        self.added, self.parent = added, parent
        start = "" if parent is None else rf"{parent}\."
        stay = "|".join((added, *but_not))
        super().__init__(rf"^{start}(?!(?:{stay})\.)(.+)$", rf"{start}{added}\.\1")

    def reverse_transform(self) -> WeightRenaming:
        """Take the prefix away."""
        return PrefixChange(prefix_to_remove=self.added, model_prefix=self.parent)
