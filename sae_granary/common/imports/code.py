"""Folders of Python code, which caches and runs must not be mixed with."""

from __future__ import annotations

import os
from pathlib import Path


def is_code(path: Path) -> bool:
    """Whether a folder holds Python code: `cache/` holds both its own code and the caches that were harvested."""
    return os.path.exists(path / "__init__.py") or path.name == "__pycache__"  # False where we may not look


def code_folder(path: Path) -> Path | None:
    """The folder of Python code that results must not be written to: `path`, or one of this package's around it.

    In a checkout the folder of the package `cache` holds caches beside its code; those are no code.
    """
    real, root = path.resolve(), Path(__file__).resolve().parents[2]
    shared = (root / "cache").resolve()
    packages = [root, *(entry.resolve() for entry in root.iterdir() if entry.is_dir())]
    around = next((folder for folder in packages if folder in real.parents), real)
    folder = shared / real.relative_to(shared).parts[0] if around == shared != real else around
    return folder if is_code(folder) else None
