"""Uploads a converted model with its model card, whose snippets name the repository."""

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
    """The card with snippets that load from a repository.

    Args:
        card: its text, with metadata.
        repository: "owner/name".
        *names: that its snippets may load from so far, besides the name in its heading.
    """
    heading = re.search("^# (.+)$", card, re.MULTILINE)
    names = (*names, heading[1] if heading else None)
    for name in filter(None, names):
        card = card.replace(f'from_pretrained("{name}"', f'from_pretrained("{repository}"')
    return card


def read_beside(name: str, file: str, revision: str = "main") -> str:
    """Read a small text file beside a model's weights; empty if there is none.

    Args:
        name: of the model, a folder or a repository on the Hub.
        file: name of the file.
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
    """Uploads a model with the card it was loaded with, where Transformers would write an empty one."""

    _kept: dict[str, str] | None = None
    _revision: str = "main"

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the model as Transformers does; with `push_to_hub`, its card is uploaded, too."""
        if kwargs.get("push_to_hub"):  # Transformers overwrites the card if it saves to the folder it loaded from
            self._kept = self._card_files()
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self._kept = None

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        if self.name_or_path != repo_id:  # otherwise Transformers has downloaded its card
            files = self._card_files() if self._kept is None else self._kept
            _write_card(Path(working_dir), repo_id, files, self.name_or_path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _card_files(self) -> dict[str, str]:
        files = {}
        if self.name_or_path:
            with suppress(OSError, ValueError):  # the folder or repository may no longer exist
                files = {file: read_beside(self.name_or_path, file, self._revision) for file in (CARD_FILE, PLOT_FILE)}
        return files


def _write_card(folder: Path, repository: str, files: dict[str, str], name: str | None) -> None:
    """Replace the card that Transformers wrote, with the tags of both."""
    written: Any = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True)
    text = named(files.get(CARD_FILE, ""), repository, name)
    card: Any = ModelCard(text, ignore_metadata_errors=True) if text else written
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *(written.data.tags or []), *TAGS]))
    card.save(folder / CARD_FILE)
    if files.get(PLOT_FILE):
        (folder / PLOT_FILE).write_text(files[PLOT_FILE], encoding="utf-8")
