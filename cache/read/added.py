"""Hook points that were added to a cache: each addition is a cache on the same rows, in a folder below `added/`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_granary.cache.errors import CorruptCacheError, NotACacheError
from sae_granary.cache.format.layout import ADDED, MANIFEST
from sae_granary.cache.format.manifest import Manifest, ShardRecord
from sae_granary.cache.format.parse import sizes_of
from sae_granary.cache.format.records import load_manifest
from sae_granary.common.rows import HookPoint

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")


@dataclass(frozen=True)
class Addition:
    """Hook points that were harvested onto the rows of a cache later."""

    path: Path
    manifest: Manifest

    def covers(self, records: Sequence[ShardRecord]) -> bool:
        """Whether it is complete and has all rows of these shards of the cache."""
        mine = dict(sizes_of(self.manifest.shards))
        return self.manifest.complete and all(mine.get(shard) == n_rows for shard, n_rows in sizes_of(records))

    def n_bytes(self, records: Sequence[ShardRecord]) -> int:
        """Bytes of its activations, norms and scales in these shards; rows and documents are shared with the cache."""
        mine, shards = self.manifest.layout.hook_arrays, self.manifest.shards
        return sum(shards[r.shard].files[array.shard_path(r.shard)].n_bytes for r in records for array in mine)


def additions(path: Path, manifest: Manifest) -> tuple[Addition, ...]:
    """The additions of a cache, also unfinished ones. Raises CorruptCacheError for one of other rows."""
    folder = path / ADDED
    if folder.is_symlink():
        raise CorruptCacheError(f"{folder} is a symbolic link; links out of a cache are not followed")
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    found = {name: added for name in names if (added := _added(folder / name)) is not None}
    check_additions(str(path), manifest, found)
    return tuple(Addition(folder / name, added) for name, added in found.items())


def _added(entry: Path) -> Manifest | None:
    try:
        return None if entry.is_symlink() else load_manifest(entry)
    except NotACacheError:
        if not (entry / MANIFEST).is_file():  # not begun yet, or removed meanwhile
            return None
        raise


def check_additions(place: str, manifest: Manifest, found: Mapping[str, Manifest]) -> None:
    """Raise CorruptCacheError where additions, by folder name, are of other rows, or a hook point is there twice."""
    for name, added in found.items():
        if identity_of_rows(added) != identity_of_rows(manifest):
            raise CorruptCacheError(
                f"{place}/{ADDED}/{name} holds hook points of other rows than {place}; move it away"
            )
    names = [hook.name for hook in manifest.hook_points]
    names += [hook.name for added in found.values() if added.complete for hook in added.hook_points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise CorruptCacheError(f"{place} holds hook point {min(twice)} twice; move one of {place}/{ADDED} away")


def is_folder_name(name: str) -> bool:
    """Whether a folder below ADDED may be called that; remote names are not trusted."""
    return _FOLDER.fullmatch(name) is not None


def identity_of_rows(manifest: Manifest) -> dict[str, object]:
    """What a cache and its additions have in common."""
    told = {name: getattr(manifest, name) for name in ("unit", "dtype", "rows_per_shard", "kept_columns")}
    return told | {name: value for name, value in manifest.fingerprint.items() if name != "hook_points"}


def hooks_of(additions: Sequence[Addition], records: Sequence[ShardRecord]) -> dict[str, tuple[HookPoint, Addition]]:
    """The added hook points that have all rows of these shards, by name."""
    return {
        hook.name: (hook, addition)
        for addition in additions
        if addition.covers(records)
        for hook in addition.manifest.hook_points
    }


def shorter(name: str | None, additions: Sequence[Addition], records: Sequence[ShardRecord]) -> str:
    """Why an added hook point is not offered: the cache was extended since; empty for a name that was not added."""
    for addition in additions:
        if name in {hook.name for hook in addition.manifest.hook_points} and not addition.covers(records):
            n = len(addition.manifest.shards)
            return f"; {name} was added to {n} of {len(records)} shards: `sae-harvest add` with its name continues it"
    return ""
