"""Where a harvest may write its cache."""

from __future__ import annotations

import os
from pathlib import Path

from sae_granary.cache.format.records import existing_manifest
from sae_granary.common.errors import ConfigError

_NAME_BYTES = 255  # of one folder name, on every common file system
_PATH_BYTES = 3800  # of the whole path: Linux takes 4096, and the cache's own files are below


def check_out(out: Path) -> None:
    """Refuse an `--out` that cannot be made: a name that no folder can have, a file in the way, or other contents."""
    _check_name(out)
    existing_manifest(out)
    if out.exists():
        return
    nearest = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        what = "a link to nothing" if nearest.is_symlink() and not nearest.exists() else "a file, not a folder"
        raise ConfigError(f"--out {out} cannot be made: {nearest} is {what}; give another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} cannot be made: no permission to write in {nearest}; give another --out")


def _check_name(out: Path) -> None:
    long = [part for part in out.parts if len(os.fsencode(part)) > _NAME_BYTES]
    if long:
        raise ConfigError(
            f"--out has a folder name of {len(os.fsencode(long[0]))} bytes ({long[0][:20]}...): "
            f"a file system takes at most {_NAME_BYTES}; give a shorter --out"
        )
    if (size := len(os.fsencode(out.absolute()))) > _PATH_BYTES:
        raise ConfigError(f"--out is a path of {size} bytes: at most {_PATH_BYTES} fit; give a shorter --out")
