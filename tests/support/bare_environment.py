"""A Python environment in which all is installed that is here, but for hf-topk."""

import sysconfig
import venv
from pathlib import Path


def python_without_the_package(folder: Path) -> Path:
    """Make the environment and return its interpreter.

    Its one path file leads to the packages here; their own path files, one of which leads to hf-topk, are not read.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder / "bin" / "python"
