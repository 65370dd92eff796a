"""The cache that a run or a sweep goes on with: the recorded one, wherever it is now, or the one that is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.read.recorded import PATHS, find_recorded
from sae_granary.common.errors import ConfigError
from sae_granary.train.errors import CheckpointError


def find_cache(stored: str, record: Mapping[str, Any], folder: Path, given: str | Path | None = None) -> str:
    """The cache that a run trains on: `given`, else the stored path, else by the paths of the record.

    A cache counts only if it has the fingerprint of the record. Raises CheckpointError for a given one that has not,
    ConfigError if there is no cache at the stored path and it is nowhere else.
    """
    if given is not None:
        if load_manifest(Path(given)).fingerprint != record.get("cache"):
            raise CheckpointError(
                f"--cache {given} is another cache than the one that {folder} was started on ({stored}): "
                "give that one, or train a new run"
            )
        return str(given)
    if (found := find_recorded(record, folder, stored)) is not None:
        return found
    if not Path(stored).exists():
        where = (record.get(PATHS) or {}).get("absolute", stored)
        raise ConfigError(
            f"the cache of {folder} is not at {where} any more: if it was moved, name it: "
            f"sae-train resume {folder} --cache FOLDER"
        )
    return stored  # opening it says what is wrong with it
