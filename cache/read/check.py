"""Existence and exact sizes of a cache's files, checked at open; and what fetches those that may come later."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from sae_granary.cache.errors import CorruptCacheError, MissingFileError
from sae_granary.cache.format.layout import COMMITS, DOCUMENTS, VOCABULARY, commit_path, documents_path
from sae_granary.cache.format.manifest import Manifest, ShardRecord
from sae_granary.cache.format.parse import LazyRecords, sizes_of
from sae_granary.cache.format.places import refuse_partial
from sae_granary.cache.format.records import blocks_of, load_manifest
from sae_granary.common.quantities import counted

LISTED_SHARDS = 1000


Enter = Callable[[Iterable[int], Iterable[int]], None]  # before rows are read of shards, with those read after them


class Fetcher(Protocol):
    """Fetches the activations of shards that are not on this machine (`cache.remote.shards`)."""

    stopped: Callable[[], bool]  # whether nothing is to be fetched any more

    def reading(self, hooks: Sequence[str], closed: Callable[[], bool]) -> AbstractContextManager[Enter]:
        """Context manager: gives what is called before rows of opened shards, by their positions, are read.

        It raises CacheError soon after the reader was `closed`, or the fetcher `stopped`.
        """

    def check(self, hooks: Sequence[str], n_shards: int, n_groups: int = 2) -> None:
        """Raise CacheError unless groups of so many shards fit."""


@contextlib.contextmanager
def removal_is_clear(path: Path) -> Iterator[None]:
    """NotACacheError instead of a missing file where the whole cache was removed meanwhile."""
    try:
        yield
    except CorruptCacheError:
        load_manifest(path)
        raise


def check_files(path: Path, manifest: Manifest, opened: Sequence[ShardRecord], *, partial: bool = False) -> None:
    """Raise unless every file of the opened shards, and each that describes the cache, has its exact size.

    Where a copy is `partial`, activations are fetched when they are read (`cache.remote.shards`), and left out here.
    """
    try:
        _check_files(path, manifest, opened, partial=partial)
    except CorruptCacheError:
        if not partial:
            refuse_partial(path)
        raise


def _check_files(path: Path, manifest: Manifest, opened: Sequence[ShardRecord], *, partial: bool) -> None:
    """See `check_files`.

    Of many shards of a large manifest only the names are looked for, by listing the folders: to ask for the size of a
    million files takes longer than to train on them for a while. Sizes are compared when a shard is first read.
    """
    folders = [COMMITS, DOCUMENTS, *manifest.layout.folders]
    linked = [folder for folder in folders if (path / folder).is_symlink()]
    if linked:
        raise CorruptCacheError(f"{path / linked[0]} is a symbolic link; links out of a cache are not followed")
    root = str(path)
    listed = isinstance(opened, LazyRecords) and len(opened) > LISTED_SHARDS
    late = {array.path for hook in manifest.layout.activations for array in manifest.layout.late(hook) if partial}
    if listed:
        _check_names(root, manifest, opened, late)
    for record in () if listed else opened:
        for name, entry in record.files.items():
            if late and os.path.dirname(name) in late:
                continue
            check_file(os.path.join(root, name), entry.n_bytes)
        if record.record is not None:
            check_file(os.path.join(root, commit_path(record.shard)), record.record.n_bytes)
    if not os.path.lexists(path / commit_path(len(manifest.shards))):  # else an extension may be replacing them
        for name, entry in (manifest.zarr_files or {}).items():
            check_file(path / name, entry.n_bytes)
    if manifest.vocabulary is not None and not has_just_begun(path, manifest, VOCABULARY):
        check_file(path / VOCABULARY, manifest.vocabulary.n_bytes)


def _check_names(root: str, manifest: Manifest, opened: Sequence[ShardRecord], late: Collection[str]) -> None:
    """Raise unless every file of these shards is listed in its folder; not those of `late` arrays."""
    numbers = [shard for shard, _ in sizes_of(opened)]
    arrays = [array for array in manifest.layout.arrays if array.path not in late]
    for name_of in (commit_path, documents_path, *(array.shard_path for array in arrays)):
        folder = os.path.dirname(name_of(0))
        names: set[str] = set()
        with contextlib.suppress(OSError):  # the folder is missing, then its first file is named
            names = set(os.listdir(os.path.join(root, folder)))
        wanted = [name_of(shard)[len(folder) + 1 :] for shard in numbers]
        if not names.issuperset(wanted):
            missing = next(name for name in wanted if name not in names)
            check_file(os.path.join(root, folder, missing), -1)


def has_just_begun(path: Path, manifest: Manifest, name: str) -> bool:
    """Whether a file is missing because a harvest has written its manifest a moment ago, and nothing else yet."""
    if manifest.complete or os.path.lexists(path / name):
        return False
    return not (path / COMMITS).is_dir() or not any((path / COMMITS).iterdir())


def check_file(path: Path | str, expected_bytes: int) -> None:
    """Raise unless there is a regular file of exactly this size."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise MissingFileError(f"{path} is missing; restore it from a copy, or harvest again") from None
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCacheError(f"{path} is not a regular file; links out of a cache are not followed")
    if status.st_size != expected_bytes:
        raise CorruptCacheError(
            f"{path} has {status.st_size:,} bytes, expected {expected_bytes:,}; restore it from a copy"
        )


def incomplete_message(path: Path, records: Sequence[ShardRecord]) -> str:
    """What is there of a cache whose harvest has not finished, and how to finish or read it."""
    n_rows = sum(record.n_rows for record in records)
    if not records and (blocks := blocks_of(path)) is not None:
        return (
            f"{path} is incomplete: {blocks.n_rows:,} rows in {counted(blocks.n_blocks, 'complete block')}; run "
            f"the same `sae-harvest run ... --out {path}` again to finish it: blocks are read when they are joined"
        )
    there = f"{n_rows:,} rows in {counted(len(records), 'committed shard')}"
    begun = there if records else "its harvest has just begun"
    return (
        f"{path} is incomplete: {begun}; run the same `sae-harvest run ... --out {path}` again to finish it, "
        "or read what is there: --allow-incomplete, in Python allow_incomplete=True"
    )
