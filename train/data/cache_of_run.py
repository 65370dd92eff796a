"""Where the cache of a run is now: both may have moved since it started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.records import load_manifest
from sae_granary.common.errors import ConfigError
from sae_granary.train.errors import CheckpointError

PATHS = "cache_paths"  # in run.json and sweep.json, since their version 2


def cache_paths(cache: Path, folder: Path) -> dict[str, str]:
    """The path of a cache as it is recorded in the folder of a run or a sweep: absolute, and relative to it."""
    absolute = cache.resolve()
    try:
        return {"absolute": str(absolute), "relative": Path(os.path.relpath(absolute, folder.resolve())).as_posix()}
    except ValueError:  # on another drive
        return {"absolute": str(absolute)}


def find_cache(stored: str, record: Mapping[str, Any], folder: Path, given: str | Path | None = None) -> str:
    """The cache that a run trains on: `given`, else the stored path, else by the paths of the record.

    A cache counts only if it has the fingerprint of the record. Raises CheckpointError for a given one that has not,
    ConfigError if there is no cache at the stored path and it is nowhere else.
    """
    fingerprint = record.get("cache")  # None in a sweep.json of before
    if given is not None:
        if load_manifest(Path(given)).fingerprint != fingerprint:
            raise CheckpointError(
                f"--cache {given} is another cache than the one that {folder} was started on ({stored}): "
                "give that one, or train a new run"
            )
        return str(given)
    paths = record.get(PATHS) or {}
    places = [stored]
    places += [str(folder / paths["relative"])] if "relative" in paths else []
    places += [paths["absolute"]] if "absolute" in paths else []
    for place in places:
        if fingerprint is not None and _fingerprint(place) == fingerprint:
            return place
    if not Path(stored).exists():
        where = paths.get("absolute", stored)
        raise ConfigError(
            f"the cache of {folder} is not at {where} any more: if it was moved, name it: "
            f"sae-train resume {folder} --cache FOLDER"
        )
    return stored  # opening it says what is wrong with it


def _fingerprint(place: str) -> Mapping[str, Any] | None:
    try:
        return load_manifest(Path(place)).fingerprint
    except (CacheError, OSError):
        return None
