"""The manifest and the commit records on disk: load them, compare them with a spec, clear what was never committed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from sae_granary.cache.errors import (
    CacheExistsError,
    CacheMismatchError,
    CorruptCacheError,
    MissingFileError,
    NotACacheError,
)
from sae_granary.cache.format.layout import (
    ABOUT,
    BLOCKS,
    COMMITS,
    DOCUMENTS,
    LOCK,
    LOG,
    MANIFEST,
    TEMPORARY,
    VOCABULARY,
    CacheLayout,
    blocks_path,
    commit_path,
)
from sae_granary.cache.format.manifest import FileEntry, Manifest, ShardRecord, differences, fitted
from sae_granary.cache.format.parse import parse_manifest, parse_shard_record
from sae_granary.cache.format.signed import Fields, load_signed, read_bytes, split_manifest
from sae_granary.common.files import read_regular
from sae_granary.common.imports.code import code_folder

_HARMLESS = {ABOUT, LOCK, LOG, TEMPORARY}  # allowed in a folder without a cache
_SHARD_FILE = re.compile(r"(?:c\.)?(\d+)(?:\.0|\.parquet)?")
_RECORD_FILE = re.compile(r"(\d{8,})\.json")
_OUTCOME_FILE = re.compile(r"\d{8}(\.cut)?\.json")
_RENEWED_SECONDS = 300.0  # a lease that was written to since is taken for held: advice, by the clock of this machine


def load_manifest(path: Path) -> Manifest:
    """The manifest of the cache in a folder; NotACacheError where there is none."""
    file = path / MANIFEST
    try:
        data = read_bytes(file)
    except (MissingFileError, NotADirectoryError):
        raise NotACacheError(_nothing(path)) from None
    head, texts = split_manifest(data)
    return parse_manifest(load_signed(file, data, head), str(file), texts)


def _nothing(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; `sae-harvest run --out {path}` makes a cache, `sae-cache ls` lists them"
    if (path / LOCK).exists() or (path / TEMPORARY).exists():
        return f"{path} holds nothing yet: a harvest has just begun, or was stopped as it began"
    return f"{path} is not an activation cache: it has no {MANIFEST}"


def load_record(path: Path, manifest: Manifest, shard: int) -> ShardRecord:
    """A commit record, with the size and checksum of its file."""
    file = path / commit_path(shard)
    data = read_bytes(file)
    record = parse_shard_record(Fields(load_signed(file, data), str(file)), manifest, consolidated=False)
    if record.shard != shard:
        raise CorruptCacheError(f"{file}: it is the record of shard {record.shard}")
    return replace(record, record=FileEntry.of(data))


def committed(path: Path, manifest: Manifest) -> tuple[Manifest, Sequence[ShardRecord]]:
    """The records of all committed shards, and the manifest that fits them.

    Where an extension of a complete cache has committed shards and not finished, that manifest is one of an unfinished
    cache; the manifest on disk still describes the complete one.
    """
    if not manifest.complete:
        records = tuple(load_records(path, manifest))
        return fitted(manifest, records), records
    later = load_records(path, manifest, len(manifest.shards))
    if not later:
        return manifest, manifest.shards
    return replace(manifest, complete=False, statistics=None, zarr_files=None), (*manifest.shards, *later)


def load_records(path: Path, manifest: Manifest, first: int = 0) -> list[ShardRecord]:
    """The commit records from shard `first` on; they are numbered without a gap."""
    shards: list[int] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = [_RECORD_FILE.fullmatch(name) for name in os.listdir(path / COMMITS)]
        shards = sorted(int(name[1]) for name in names if name and int(name[1]) >= first)
    if shards != list(range(first, first + len(shards))):
        missing = next(i for i, shard in enumerate([*shards, -1], first) if i != shard)
        raise CorruptCacheError(
            f"{path / commit_path(missing)} is missing, though later shards are committed; restore it"
        )
    return [load_record(path, manifest, shard) for shard in shards]


def refuse_code(path: Path) -> None:
    """Raise CacheExistsError for a folder of Python code, and for anything inside a folder of this package's code."""
    if folder := code_folder(path):
        raise CacheExistsError(f"{path} belongs to Python code ({folder.name}/), not to a cache; use another --out")


def existing_manifest(path: Path) -> Manifest | None:
    """The manifest of a folder to write to; None where there is nothing yet, CacheExistsError for anything else."""
    refuse_code(path)
    if not path.exists():
        return None
    if not path.is_dir():
        raise CacheExistsError(f"{path} is a file, expected a folder; use another --out")
    # Listed first: what another process has begun meanwhile begins with its manifest.
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in _HARMLESS)
    if not (path / MANIFEST).exists():
        if others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise CacheExistsError(f"{path} holds something that is not a cache ({shown}); use another --out")
        return None
    try:
        return load_manifest(path)
    except NotACacheError as error:
        raise CacheExistsError(f"{error}; use another --out") from None


def refuse_mismatch(path: Path, have: Manifest, want: Manifest) -> bool:
    """Raise CacheMismatchError where a folder holds another harvest; True where that one has committed nothing."""
    differing = differences(have, want)
    if not differing:
        return False
    if not have.complete and not has_records(path):
        return True
    number = 2
    while path.with_name(f"{path.name}_{number}").exists():
        number += 1
    raise CacheMismatchError(path, differing, str(path.with_name(f"{path.name}_{number}")))


def has_records(path: Path) -> bool:
    """Whether any shard is committed."""
    return any((path / COMMITS).glob("*.json"))


def remove_contents(path: Path, layout: CacheLayout) -> None:
    """Remove the files of a cache that has committed nothing; anything else in the folder stays."""
    ours = (BLOCKS, *layout.groups, COMMITS, DOCUMENTS, VOCABULARY, "zarr.json", MANIFEST)  # the last one makes it ours
    for name in ours:
        target = path / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def clear_uncommitted(path: Path, layout: CacheLayout, n_shards: int) -> None:
    """Remove shard files that a killed writer put into place without reaching the record."""
    for folder in (*(array.path for array in layout.arrays), DOCUMENTS):
        for file in (path / folder).iterdir():
            match = _SHARD_FILE.fullmatch(file.name)
            if match and int(match[1]) >= n_shards and not (path / commit_path(int(match[1]))).exists():
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()


@dataclass(frozen=True)
class InBlocks:
    """Complete blocks and their rows, and whether a process works on another one now."""

    n_blocks: int = 0
    n_rows: int = 0  # without those of the complete cache that is extended
    growing: bool = False


def blocks_of(path: Path) -> InBlocks | None:
    """The blocks that are not joined yet, of a harvest or of an extension of a complete cache; None without any."""
    if (path / BLOCKS).is_symlink() or not (path / BLOCKS).is_dir():
        return None
    shards = load_manifest(path).shards
    current = path / blocks_path(len(shards))  # those in others are joined
    rows: dict[str, int] = {}
    growing = False
    for folder in (path / BLOCKS, *(path / BLOCKS).glob("after_*")):
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    if folder == current and _OUTCOME_FILE.fullmatch(entry.name):
                        n_rows = int(json.loads(read_regular(Path(entry.path)))["n_rows"])
                        if entry.name.endswith(".cut.json") or entry.name[:8] not in rows:
                            rows[entry.name[:8]] = n_rows
                    elif entry.name.endswith(".lease") and time.time() - entry.stat().st_mtime < _RENEWED_SECONDS:
                        growing |= json.loads(read_regular(Path(entry.path))).get("released") is not True
    known = takewhile(lambda record: f"{record.block or 0:08d}" in rows, reversed(shards))  # of the last block
    return InBlocks(len(rows), sum(rows.values()) - sum(record.n_rows for record in known), growing)


def bytes_in_blocks(path: Path) -> int:
    """Bytes of the files of blocks that do not have their names in the cache yet."""
    total = 0
    for folder, _, names in os.walk(path / BLOCKS):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a process works there
                status = os.lstat(os.path.join(folder, name))
                total += status.st_size if status.st_nlink == 1 else 0
    return total
