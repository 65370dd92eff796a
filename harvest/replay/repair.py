"""Restore damaged files of a complete cache: their rows are harvested again, and must give the recorded bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.format.layout import VOCABULARY, commit_path
from sae_granary.cache.format.manifest import FileEntry, Manifest
from sae_granary.cache.format.places import find_cache
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.format.zarr_json import zarr_files
from sae_granary.cache.read.added import additions
from sae_granary.cache.read.check import check_file
from sae_granary.cache.write.session import Session, locked
from sae_granary.cache.write.spec_json import vocabulary_bytes
from sae_granary.common.signals import StopRequest
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.pipeline import Pipeline
from sae_granary.harvest.prepare import prepare
from sae_granary.harvest.progress import Progress, RunLog
from sae_granary.harvest.replay.one_shard import ShardAgain
from sae_granary.harvest.replay.recorded import (
    recorded_config,
    recorded_where,
    refuse_other_batching,
    refuse_other_source,
)
from sae_granary.harvest.replay.stream import Replay, recorded_ends
from sae_granary.harvest.run import load
from sae_granary.harvest.spec import as_begun, cache_spec
from sae_granary.models.locate import check_weights

Say = Callable[[str], None]


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


def repair(
    to: str | Path,
    *,
    model: str | None = None,
    dataset: str | None = None,
    device: str | None = None,
    quiet: bool = False,
    stop: StopRequest | None = None,
) -> list[Damage]:
    """Restore every damaged file of a complete cache; what was damaged. A file is replaced by its recorded bytes only.

    The rows of damaged shards are harvested again from the recorded source, in the recorded batches. An interrupted
    repair has restored some files; the same call restores the rest. `model` and `dataset` say where these are now.

    Raises HarvestError where model, text or settings differ from the record, or other bytes came out: then nothing of
    that shard is written, and the message names the rows that are lost. CacheError where the manifest is damaged.
    """
    stop = StopRequest() if stop is None else stop
    damages = find_damage(to)
    for damage in damages:
        lock = locked(damage.path)
        session = Session(damage.path)
        try:
            if load_manifest(damage.path).to_json() != damage.manifest.to_json():
                raise HarvestError(f"{damage.path} has changed since its files were checked: run the command again")
            shutil.rmtree(session.folder.parent, ignore_errors=True)
            session.folder.mkdir(parents=True)
            places = {"model": model, "dataset": dataset, "device": device}
            with Progress(damage.manifest.unit, damage.n_rows, quiet=quiet) as progress:
                _restore(damage, session, progress, stop, places)
        finally:
            shutil.rmtree(session.folder.parent, ignore_errors=True)
            lock.release()
    return damages


def _restore(
    damage: Damage, session: Session, progress: Progress, stop: StopRequest, places: Mapping[str, str | None]
) -> None:
    path, manifest = damage.path, damage.manifest
    wanted = zarr_files(manifest.layout, len(manifest.shards))
    for name in damage.others:
        if name in wanted:
            _replace(session, name, wanted[name], (manifest.zarr_files or {})[name])
    if not damage.shards and VOCABULARY not in damage.others:
        return
    try:
        config = recorded_config(path, manifest, recorded_where(manifest), path.with_name(path.name + ".new"), **places)
        prepared = prepare(config, progress.say)
        check_weights(prepared.located)
        refuse_other_source(path, prepared, manifest)
    except Exception as error:
        error.args = (f"{error}{_lost(damage)}",)
        raise
    prepared = replace(prepared, recorded_buffer=int(manifest.fingerprint["buffer_tokens"]))
    if VOCABULARY in damage.others and manifest.vocabulary is not None:
        _replace(session, VOCABULARY, vocabulary_bytes(cache_spec(prepared).vocabulary) or b"", manifest.vocabulary)
    if not damage.shards:
        return
    progress.say(f"loading {prepared.located.name} ({prepared.compute_dtype}, {prepared.device})")
    prepared, loaded = load(prepared, progress.say)
    refuse_other_batching(manifest, prepared)
    prepared = as_begun(prepared, manifest.provenance)
    stop.defer()
    for shard, names in damage.shards.items():
        progress.say(f"harvesting shard {shard} again: {manifest.shards[shard].n_rows:,} rows")
        again = ShardAgain(path, manifest, shard, session.folder / str(shard))
        end = again.n_rows + manifest.shards[shard].n_rows
        what = Replay(ends=damage.ends, until=end, compare=False)
        try:
            Pipeline(prepared, loaded, again, progress, RunLog(path), stop.check, what).fill()
            _put_back(damage, session, again, shard, names)
        except HarvestError as error:
            raise HarvestError(
                f"shard {shard} of {path} does not come out as it was: {error}{_lost(damage)}"
            ) from error
        finally:
            again.discard()


def _put_back(damage: Damage, session: Session, again: ShardAgain, shard: int, names: Sequence[str]) -> None:
    """Replace the damaged files of a shard, if they came out as recorded; documents tell the name of a local text."""
    record = damage.manifest.shards[shard]
    temporary, found = again.finished()
    if different := [name for name in names if name in temporary and found.files[name] != record.files[name]]:
        raise HarvestError(
            f"{different[0]} has another checksum; the text has changed, or this is another machine or another version "
            "of torch than it was harvested with"
        )
    for name in names:
        if name in temporary:
            session.replace(name, temporary[name].read_bytes())
    if commit_path(shard) in names and record.record is not None:
        body = {"version": damage.manifest.version, **replace(found, files=record.files).to_json()}
        _replace(session, commit_path(shard), dump_signed(body), record.record)


def _replace(session: Session, name: str, data: bytes, entry: FileEntry) -> None:
    if FileEntry.of(data) != entry:
        raise HarvestError(f"{session.path / name} does not come out as it was; restore it from a copy")
    session.replace(name, data)


def _lost(damage: Damage) -> str:
    """What is lost unless the source comes back."""
    if not damage.shards:
        return ""
    size, records = damage.manifest.rows_per_shard, damage.manifest.shards
    spans = [f"{shard * size:,} to {shard * size + records[shard].n_rows - 1:,}" for shard in damage.shards]
    shown = ", ".join(spans[:4]) + (", ..." if len(spans) > 4 else "")
    return f"; lost are {damage.n_rows:,} rows (row ids {shown}), unless a copy has them"


def report_lines(damages: Sequence[Damage], *, restored: bool) -> list[str]:
    """What was damaged, for people."""
    if not damages:
        return ["every file has its recorded checksum: nothing to repair"]
    done = "restored" if restored else "damaged"
    lines = [f"{done}: {damage.path / name}" for damage in damages for name in damage.files]
    n_rows = sum(damage.n_rows for damage in damages)
    if not restored and n_rows:
        lines.append(f"without --dry-run {n_rows:,} rows are harvested again from the recorded text and model")
    return lines
