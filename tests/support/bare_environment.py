"""A Python environment with all packages of this one except hf-topk."""

import sysconfig
import venv
from pathlib import Path


def python_without_the_package(folder: Path) -> Path:
    """Make the environment and return its interpreter.

    Its .pth file adds the site-packages of this environment. Their .pth files, one of which adds hf-topk, are not read.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder / "bin" / "python"
