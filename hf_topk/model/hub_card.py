"""The model card of a converted model comes along where it is uploaded, and names the repository it is in."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

CARD_FILE = "README.md"
PLOT_FILE = "agreement.svg"
TAGS = ("hf-topk", "topk_experts")


def named(card: str, repository: str, *names: str | None) -> str:
    """A card whose snippets load from a repository.

    Args:
        card: its text, metadata and all.
        repository: "owner/name".
        *names: what the snippets may load from now, beside the name in its heading.
    """
    heading = re.search("^# (.+)$", card, re.MULTILINE)
    names = (*names, heading[1] if heading else None)
    for name in filter(None, names):
        card = card.replace(f'from_pretrained("{name}"', f'from_pretrained("{repository}"')
    return card


def read_beside(name: str, file: str, revision: str = "main") -> str:
    """A small file that lies beside the weights; empty if there is none.

    Args:
        name: of a model: a folder, or a repository of the Hub.
        file: its name.
        revision: of the repository: a branch, a tag or a commit.
    """
    path = Path(name).expanduser() / file
    if not path.parent.is_dir():
        try:
            path = Path(hf_hub_download(name, file, revision=revision))
        except EntryNotFoundError:
            return ""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


class KeepsCard(PreTrainedModel):
    """Is uploaded with the card of where it was loaded from; Transformers puts an empty one in its place."""

    _kept: dict[str, str] | None = None
    _revision: str = "main"

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the model as Transformers does; with `push_to_hub`, its card is uploaded, too."""
        if kwargs.get("push_to_hub"):  # Transformers writes over the card if the folder is the one it was loaded from
            self._kept = self._card_files()
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._kept = None

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        if self.name_or_path != repo_id:  # else Transformers has fetched its card
            files = self._card_files() if self._kept is None else self._kept
            _write_card(Path(working_dir), repo_id, files, self.name_or_path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _card_files(self) -> dict[str, str]:
        files = {}
        if self.name_or_path:
            with suppress(OSError, ValueError):  # there may be none any more
                files = {file: read_beside(self.name_or_path, file, self._revision) for file in (CARD_FILE, PLOT_FILE)}
        return files


def _write_card(folder: Path, repository: str, files: dict[str, str], name: str | None) -> None:
    """Put a card in the place of the one that Transformers wrote, with the tags of both."""
    written: Any = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True)
    text = named(files.get(CARD_FILE, ""), repository, name)
    card: Any = ModelCard(text, ignore_metadata_errors=True) if text else written
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *(written.data.tags or []), *TAGS]))
    card.save(folder / CARD_FILE)
    if files.get(PLOT_FILE):
        (folder / PLOT_FILE).write_text(files[PLOT_FILE], encoding="utf-8")
