"""Restore damaged files of a complete cache: their rows are harvested again, and must give the recorded bytes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sae_granary.cache.format.layout import VOCABULARY, commit_path
from sae_granary.cache.format.manifest import FileEntry
from sae_granary.cache.format.places import find_cache
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.format.zarr_json import zarr_files
from sae_granary.cache.read.added import additions
from sae_granary.cache.write.session import Session, locked, remove_leftovers
from sae_granary.cache.write.spec_json import vocabulary_bytes
from sae_granary.common.signals import StopRequest
from sae_granary.harvest.errors import HarvestError
from sae_granary.harvest.pipeline import Pipeline
from sae_granary.harvest.prepare import prepare
from sae_granary.harvest.progress import Progress, RunLog
from sae_granary.harvest.ranks.blocks import Records, begin_of
from sae_granary.harvest.replay.damage import Damage, find_damage
from sae_granary.harvest.replay.in_blocks import ends_of, of_block
from sae_granary.harvest.replay.one_shard import ShardAgain
from sae_granary.harvest.replay.recorded import (
    recorded_config,
    recorded_where,
    refuse_other_batching,
    refuse_other_source,
)
from sae_granary.harvest.replay.stream import Replay
from sae_granary.harvest.run import load
from sae_granary.harvest.spec import as_begun, cache_spec
from sae_granary.models.locate import check_weights

Say = Callable[[str], None]


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
    places = {"model": model, "dataset": dataset, "device": device}
    path, damages = find_cache(to), find_damage(to)
    if damages:
        log = RunLog(path)
        with locked(path), contextlib.ExitStack() as at_end:
            at_end.callback(log.close, keep=True)
            for damage in damages:
                with Progress(damage.manifest.unit, damage.n_rows, quiet=quiet) as progress:
                    _restore_locked(damage, _Run(progress, log, stop, places))
    for place in (path, *(part.path for part in additions(path, load_manifest(path)))):
        remove_leftovers(place)  # of one that was killed after its last file
    return damages


@dataclass(frozen=True)
class _Run:
    """What a repair tells and asks while it runs; `places` are where model and text are now."""

    progress: Progress
    log: RunLog
    stop: StopRequest
    places: Mapping[str, str | None]


def _restore_locked(damage: Damage, run: _Run) -> None:
    if load_manifest(damage.path).to_json() != damage.manifest.to_json():
        raise HarvestError(f"{damage.path} has changed since its files were checked: run the command again")
    session = Session(damage.path)
    shutil.rmtree(session.folder.parent, ignore_errors=True)
    session.folder.mkdir(parents=True)
    try:
        _restore(damage, session, run)
        run.log.write(f"repaired {len(damage.files)} files of {damage.path}")
    except BaseException as error:
        run.log.write(f"repair stopped: {type(error).__name__}: {error}")
        raise
    finally:
        shutil.rmtree(session.folder.parent, ignore_errors=True)


def _restore(damage: Damage, session: Session, run: _Run) -> None:
    progress = run.progress
    path, manifest = damage.path, damage.manifest
    wanted = zarr_files(manifest.layout, len(manifest.shards))
    for name in damage.others:
        if name in wanted:
            _replace(session, name, wanted[name], (manifest.zarr_files or {})[name])
    if not damage.shards and VOCABULARY not in damage.others:
        return
    try:
        out = path.with_name(path.name + ".new")
        config = recorded_config(path, manifest, recorded_where(manifest), out, **run.places)
        prepared = prepare(config, progress.say)
        check_weights(prepared.located)
        refuse_other_source(path, prepared, manifest)
    except Exception as error:
        error.args = (f"{error}{damage.lost}",)
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
    run.stop.defer()
    text, docs = Records(prepared.source), manifest.block_docs
    for shard, names in damage.shards.items():
        record = manifest.shards[shard]
        progress.say(f"harvesting shard {shard} again: {record.n_rows:,} rows")
        again = ShardAgain(path, manifest, shard, session.folder / str(shard))
        what = Replay(ends=damage.ends, until=again.n_rows + record.n_rows, compare=False)
        part = prepared
        if record.block is not None and docs is not None:
            part = of_block(prepared, text, manifest.shards, record.block)
            what = replace(what, ends=ends_of(manifest, record.block), begin=begin_of(record.block, docs))
        try:
            Pipeline(part, loaded, again, progress, run.log, run.stop.check, what).fill()
            _put_back(damage, session, again, shard, names)
        except HarvestError as error:
            raise HarvestError(f"shard {shard} of {path} does not come out as it was: {error}{damage.lost}") from error
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
            session.move(name, temporary[name])
    if commit_path(shard) in names and record.record is not None:
        body = {"version": damage.manifest.version, **replace(found, files=record.files).to_json()}
        _replace(session, commit_path(shard), dump_signed(body), record.record)


def _replace(session: Session, name: str, data: bytes, entry: FileEntry) -> None:
    if FileEntry.of(data) != entry:
        raise HarvestError(f"{session.path / name} does not come out as it was; restore it from a copy")
    session.replace(name, data)
