"""Where the cache that a run or a sweep recorded is now: both may have moved since."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.places import is_partial
from sae_granary.cache.format.records import load_manifest

PATHS = "cache_paths"  # in run.json and sweep.json, since their version 2


def cache_paths(cache: Path, folder: Path) -> dict[str, str]:
    """The path of a cache as it is recorded in the folder of a run or a sweep: absolute, and relative to it.

    Of a copy without its activations none is: the run has the URL.
    """
    if is_partial(cache):
        return {}
    absolute = cache.resolve()
    try:
        return {"absolute": str(absolute), "relative": Path(os.path.relpath(absolute, folder.resolve())).as_posix()}
    except ValueError:  # on another drive
        return {"absolute": str(absolute)}


def find_recorded(record: Mapping[str, Any], folder: Path, stored: str | None = None) -> str | None:
    """The path of the recorded cache: `stored`, else relative to the folder, else the absolute one; None if at none.

    A cache counts only if it has the fingerprint of the record (`cache`; a sweep.json of earlier versions has none).
    """
    fingerprint, paths = record.get("cache"), record.get(PATHS) or {}
    places = [stored] if stored is not None else []
    places += [str((folder / paths["relative"]).resolve())] if "relative" in paths else []
    places += [paths["absolute"]] if "absolute" in paths else []
    return next((p for p in places if fingerprint is not None and _fingerprint(p) == fingerprint), None)


def _fingerprint(place: str) -> Mapping[str, Any] | None:
    try:
        return load_manifest(Path(place)).fingerprint
    except (CacheError, OSError):
        return None
