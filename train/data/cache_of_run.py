"""Finding the cache of a run or a sweep that continues: the recorded one, wherever it is now, or one given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_granary.cache.errors import UnknownNameError
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.opening import open_cache
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.read.recorded import PATHS, find_recorded
from sae_granary.cache.remote.mirror import locate
from sae_granary.cache.remote.store import is_url
from sae_granary.common.errors import ConfigError
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.errors import CheckpointError
from sae_granary.train.state.identity import check_identity


def find_cache(
    stored: str,
    record: Mapping[str, Any],
    folder: Path,
    given: str | Path | None = None,
    *,
    by_shard: bool,
) -> str:
    """The cache that a run trains on: `given`, else the stored one, else by the paths of the record; a path or a URL.

    A URL stays one: ranks on other machines have separate copies. A cache counts only if it has the fingerprint of
    the record. Raises CheckpointError for another one that is given or that took the stored path, ConfigError if there
    is none there and the recorded one is nowhere else.
    """
    fingerprint = record.get("cache")  # None in a sweep.json of earlier versions
    if given is not None:
        place = locate(given, by_shard=by_shard)
        if load_manifest(place).fingerprint != fingerprint:
            raise CheckpointError(
                f"--cache {given} is another cache than the one that {folder} was started on ({stored}): "
                "give that one, or train a new run"
            )
        return str(given) if is_url(given) else str(place)
    if not is_url(stored) and (found := find_recorded(record, folder, stored)) is not None:
        return found
    place = locate(stored, by_shard=by_shard) if is_url(stored) else Path(stored)
    if not place.exists():
        where = (record.get(PATHS) or {}).get("absolute", stored)
        raise ConfigError(
            f"the cache of {folder} is not at {where} any more: if it was moved, name it: "
            f"sae-train resume {folder} --cache FOLDER"
        )
    if fingerprint is not None:
        there = load_manifest(place).fingerprint
        check_identity({"cache": fingerprint, "order": {}}, {"cache": there, "order": {}}, folder)
    return stored


def open_cache_of(config: TrainConfig) -> Cache:
    """The cache of an unresolved config; of a URL, with groups of shards, while it is fetched."""
    by_shard = config.shuffle_shards is not None
    return open_cache(config.cache, allow_incomplete=config.allow_incomplete, by_shard=by_shard)


def open_pinned(path: str, shards: Sequence[tuple[int, int]], *, allow_incomplete: bool, by_shard: bool) -> Cache:
    """Open a cache with the shards (number, rows) that a run was started on.

    Raises CheckpointError if they are not all there with as many rows, and what `open_cache` raises.
    """
    wanted = dict(shards)
    try:
        opened = open_cache(path, shards=wanted, allow_incomplete=allow_incomplete, by_shard=by_shard)
        found = {shard.index: shard.n_rows for shard in opened.shards}
    except UnknownNameError:
        found = {}
    if found == wanted:
        return opened
    whole = open_cache(path, allow_incomplete=True, by_shard=by_shard)
    raise CheckpointError(
        f"{path} holds {whole.n_rows:,} rows in {len(whole.shards)} shards, not the {sum(wanted.values()):,} in "
        f"{len(wanted)} that the run was started on: name the whole cache with --cache, or train a new run"
    )
