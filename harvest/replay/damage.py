"""What is damaged in a complete cache, and the messages about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.format.layout import VOCABULARY, commit_path
from sae_granary.cache.format.manifest import FileEntry, Manifest
from sae_granary.cache.format.places import find_cache
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.read.added import additions
from sae_granary.cache.read.check import check_file
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.replay.stream import recorded_ends


@dataclass(frozen=True)
class Damage:
    """Damaged files of one cache, or of hook points that were added to it."""

    path: Path
    manifest: Manifest
    shards: Mapping[int, tuple[str, ...]]  # shard -> its damaged files
    others: tuple[str, ...]  # Zarr metadata and vocabulary: no model is needed for them
    ends: tuple[int, ...]  # documents at which the harvests of its rows ended

    @property
    def n_rows(self) -> int:
        """Rows of the damaged shards."""
        return sum(self.manifest.shards[shard].n_rows for shard in self.shards)

    @property
    def files(self) -> tuple[str, ...]:
        """Every damaged file."""
        return (*self.others, *(name for names in self.shards.values() for name in names))

    @property
    def lost(self) -> str:
        """What is lost unless the source comes back, as the end of a message."""
        if not self.shards:
            return ""
        size, records = self.manifest.rows_per_shard, self.manifest.shards
        spans = [f"{shard * size:,} to {shard * size + records[shard].n_rows - 1:,}" for shard in self.shards]
        shown = ", ".join(spans[:4]) + (", ..." if len(spans) > 4 else "")
        return f"; lost are {self.n_rows:,} rows (row ids {shown}), unless a copy has them"


def find_damage(to: str | Path) -> list[Damage]:
    """Damage of a complete cache and its additions, by existence, size and checksum of every file; empty if none.

    Raises CacheError where the manifest itself is damaged or missing: nothing else records what the files should be.
    """
    path = find_cache(to)
    manifest = load_manifest(path)
    if not manifest.complete:
        raise HarvestError(f"{path} is not complete: run its `sae-harvest run` again; repair restores complete caches")
    ends = recorded_ends(manifest)
    found = [_damage(path, manifest, ends)]
    found += [_damage(part.path, part.manifest, ends) for part in additions(path, manifest) if part.manifest.complete]
    return [damage for damage in found if damage.files]


def _damage(path: Path, manifest: Manifest, ends: tuple[int, ...]) -> Damage:
    shards = {}
    for record in manifest.shards:
        files = dict(record.files)
        if record.record is not None:
            files[commit_path(record.shard)] = record.record
        if bad := tuple(name for name, entry in files.items() if not _is_whole(path / name, entry)):
            shards[record.shard] = bad
    others = dict(manifest.zarr_files or {})
    if manifest.vocabulary is not None:
        others[VOCABULARY] = manifest.vocabulary
    damaged = tuple(name for name, entry in others.items() if not _is_whole(path / name, entry))
    return Damage(path, manifest, shards, damaged, ends)


def _is_whole(file: Path, entry: FileEntry) -> bool:
    try:
        check_file(file, entry.n_bytes)
        return hash_file(file) == entry
    except (CacheError, OSError):
        return False


def report_lines(damages: Sequence[Damage], *, restored: bool) -> list[str]:
    """What was damaged, for people."""
    if not damages:
        return ["every file has its recorded checksum: nothing to repair"]
    done = "restored" if restored else "damaged"
    lines = [f"{done}: {damage.path / name}" for damage in damages for name in damage.files]
    shards = {shard: damage.manifest.shards[shard].n_rows for damage in damages for shard in damage.shards}
    n_rows = sum(shards.values())  # a row with several hook points is harvested once
    if not restored and n_rows:
        lines.append(f"without --dry-run {n_rows:,} rows are harvested again from the recorded text and model")
    return lines
