"""Checks of the tests that read documents."""

from pathlib import Path

import pytest

from hf_topk.documents import read_documents
from hf_topk.model.errors import InputError


def check_unreadable(source: str | Path, *parts: str) -> str:
    """Check that a source is refused in one line that contains the parts; return the line."""
    with pytest.raises(InputError) as caught:
        read_documents(str(source))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)
