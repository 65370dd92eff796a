"""Where caches are looked for: a path, else its name in the folders of GRANARY_CACHE_DIR."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sae_granary.cache.errors import CacheError, NotACacheError
from sae_granary.common.files import home_path

VARIABLE = "GRANARY_CACHE_DIR"
PARTIAL = ".shards"  # behind the name of a copy


def cache_folders() -> list[Path]:
    """The folders of GRANARY_CACHE_DIR, which are separated as in PATH."""
    return [home_path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]


def find_cache(path: str | os.PathLike[str]) -> Path:
    """The path itself if something is there, else the first place with its name below a folder of GRANARY_CACHE_DIR.

    Without that variable, or for an absolute path, the path itself. Raises NotACacheError with the places looked at.
    """
    path = home_path(path)
    folders = cache_folders()
    if os.path.exists(path) or path.is_absolute() or not folders:
        return path
    places = [folder / path for folder in folders]
    found = next((place for place in places if os.path.exists(place)), None)
    if found is None:
        looked = ", ".join(str(place) for place in (path, *places))
        raise NotACacheError(f"no cache {path}: looked at {looked} ({VARIABLE}); `sae-cache ls` lists caches")
    return found


def is_partial(folder: Path) -> bool:
    """Whether a folder has the name of a copy whose activations are fetched when they are read."""
    return re.search(rf"-[0-9a-f]{{12}}{re.escape(PARTIAL)}$", folder.name) is not None


def refuse_partial(folder: Path) -> None:
    """Raise CacheError for such a copy, which only its URL opens."""
    if is_partial(folder):
        raise CacheError(f"{folder} is a copy of which runs fetch what they read: give the URL of the cache")
