"""What the tests of the examples share."""

from pathlib import Path

import pytest
from filelock import FileLock

from hf_topk.convert import Recipe, convert_checkpoint


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The bundled model, converted once for all processes of the tests, on part of the calibration text."""
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary if worker_id == "master" else temporary.parent) / "bundled-topk"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            convert_checkpoint(None, folder, Recipe(positions=4000, distill_steps=100))
    return folder
