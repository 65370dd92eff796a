"""Check every byte of a cache: checksums, Zarr metadata, statistics, row order. One finding per file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.format.layout import (
    ABOUT,
    ADDED,
    BLOCKS,
    COMMITS,
    DOCUMENTS,
    LOCK,
    LOG,
    MANIFEST,
    TEMPORARY,
    VOCABULARY,
    commit_path,
    documents_path,
)
from sae_granary.cache.format.manifest import FileEntry, ShardRecord
from sae_granary.cache.format.records import load_record
from sae_granary.cache.format.zarr_json import zarr_files
from sae_granary.cache.read.added import Addition
from sae_granary.cache.read.check import check_file, has_just_begun
from sae_granary.cache.read.reader import Cache, open_local
from sae_granary.cache.read.verify_rows import check_rows, check_totals
from sae_granary.common.files import read_regular


@dataclass(frozen=True)
class Finding:
    """What was found about one file; `problem` is None if nothing is wrong."""

    path: str
    problem: str | None = None


@dataclass(frozen=True)
class Report:
    """All findings, and the files in the folder that belong to no cache."""

    findings: tuple[Finding, ...]
    foreign: tuple[str, ...] = ()
    n_bytes: int = 0  # read and found good
    complete: bool = True  # whether the harvest has finished

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are problems."""
        return tuple(finding for finding in self.findings if finding.problem is not None)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    *,
    quick: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Verify a cache, complete or not. `quick` stops after existence and sizes.

    `progress(done, total)` counts bytes. A cache that cannot be opened gives one finding with the reason.
    """
    path = Path(path)
    before = _state(path)
    report = _verify(path, quick=quick, progress=progress)
    if report.problems and _state(path) != before:  # it has grown: what describes it may be newer than what was opened
        return _verify(path, quick=quick, progress=progress)
    return report


def _state(path: Path) -> object:
    try:
        return read_regular(path / MANIFEST), sorted(os.listdir(path / COMMITS))
    except OSError:
        return None


def _verify(path: Path, *, quick: bool, progress: Callable[[int, int], None]) -> Report:
    there = list(_files(path))  # first: what is written meanwhile is recorded when the cache is opened
    try:
        cache = open_local(path, allow_incomplete=True)
    except CacheError as error:
        return Report((Finding(MANIFEST, str(error)),))
    findings: list[Finding] = []
    n_bytes = 0
    if not quick:
        for finding, size in _check_all(cache):
            findings.append(finding)
            n_bytes += 0 if finding.problem else size
            progress(n_bytes, cache.n_bytes)
    foreign = [*_foreign(cache, there)]
    for addition in cache.additions:
        below = addition.path.relative_to(path).as_posix()

        def further(done: int, _: int, before: int = n_bytes) -> None:
            progress(min(before + done, cache.n_bytes), cache.n_bytes)

        report = verify(addition.path, quick=quick, progress=further)
        findings += [Finding(f"{below}/{finding.path}", finding.problem) for finding in report.findings]
        findings += [
            Finding(f"{below}/{commit_path(shard)}", problem) for shard, problem in _other_rows(cache, addition)
        ]
        foreign += [f"{below}/{name}" for name in report.foreign]
        n_bytes += report.n_bytes
    return Report(tuple(findings), tuple(foreign), n_bytes, cache.complete)


def _other_rows(cache: Cache, addition: Addition) -> Iterator[tuple[int, str]]:
    """The shards of an addition whose rows or documents are not those of the cache."""
    for ours, theirs in zip(cache.records, addition.manifest.shards, strict=False):
        for name, entry in theirs.files.items():
            if name in ours.files and ours.files[name] != entry:
                yield theirs.shard, f"{name} is not that of the cache that it was added to"


def _check_all(cache: Cache) -> Iterator[tuple[Finding, int]]:
    yield from _check_zarr(cache)
    if cache.manifest.vocabulary is not None and not has_just_begun(cache.path, cache.manifest, VOCABULARY):
        yield Finding(VOCABULARY, _compare(cache.path / VOCABULARY, cache.manifest.vocabulary)), 0
    for i, record in enumerate(cache.opened):
        damaged = False
        for name, entry in record.files.items():
            problem = _compare(cache.path / name, entry)
            damaged |= problem is not None
            yield Finding(name, problem), entry.n_bytes
        commit = commit_path(record.shard)
        problem, own = _read_record(cache, record)
        if own is not None and not damaged:  # what follows would only repeat the damage
            try:
                problem = check_rows(cache, i, own)
            except OSError as error:  # a file has gone
                problem = str(error)
        yield Finding(commit, problem), 0
    yield Finding(MANIFEST, check_totals(cache)), 0


def _compare(path: Path, entry: FileEntry) -> str | None:
    try:
        check_file(path, entry.n_bytes)
        found = hash_file(path)
    except (CacheError, OSError) as error:
        return str(error)
    return None if found == entry else f"checksum is {found.xxh3}, expected {entry.xxh3}"


def _check_zarr(cache: Cache) -> Iterator[tuple[Finding, int]]:
    expected = zarr_files(cache.layout, len(cache.records))
    entries = cache.manifest.zarr_files
    for name in expected:
        if has_just_begun(cache.path, cache.manifest, name):
            continue
        if entries is not None and name not in entries:
            yield Finding(name, "the manifest does not list it"), 0
            continue
        problem = None if entries is None else _compare(cache.path / name, entries[name])
        compare = _compare_json if name.endswith(".json") else _compare_bytes
        yield Finding(name, problem or compare(cache.path / name, expected[name], cache.complete)), 0


def _compare_json(path: Path, expected: bytes, complete: bool) -> str | None:
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        return f"not readable as JSON: {error}"
    wanted = json.loads(expected)
    if not complete:  # a writer brings the shape up to date after the record: it may lag
        found, wanted = _without_length(found), _without_length(wanted)
    return None if found == wanted else "its contents are not those of this cache's layout"


def _compare_bytes(path: Path, expected: bytes, complete: bool) -> str | None:
    try:
        return None if read_regular(path) == expected else "its contents are not those of the commit record"
    except OSError as error:
        return f"not readable: {error}"


def _without_length(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: value[1:] if key == "shape" else _without_length(value) for key, value in node.items()}
    return node


def _read_record(cache: Cache, record: ShardRecord) -> tuple[str | None, ShardRecord | None]:
    """The shard's own record, held against what the manifest says of it."""
    try:
        own = load_record(cache.path, cache.manifest, record.shard)
    except CacheError as error:
        return str(error), None
    if cache.complete and replace(own, statistics=None, affines=None) != record:
        return "it differs from what the manifest says of this shard", None
    for hook, affine in (own.affines or {}).items():
        if not affine.equals((cache.manifest.affines or {})[hook]):
            return f"the step or offset of {hook} differs from the manifest's", None
    return None, own


def _known(cache: Cache) -> set[str]:
    """The paths of files and folders that belong to a cache, those of a shard that is being committed included."""
    known: set[str] = {MANIFEST, VOCABULARY, ABOUT, LOCK, LOG, COMMITS, DOCUMENTS, ADDED, *cache.layout.folders}
    known |= set(zarr_files(cache.layout, 0))
    for record in cache.records:
        known |= {commit_path(record.shard), *record.files}
    shard = len(cache.records)
    return known | {array.shard_path(shard) for array in cache.layout.arrays} | {documents_path(shard)}


def _foreign(cache: Cache, paths: Iterable[str]) -> Iterator[str]:
    """The paths that do not belong to a cache or its additions."""
    known, parts = _known(cache), {part.path.relative_to(cache.path).as_posix() for part in cache.additions}
    for path in paths:
        if path not in known and "/".join(path.split("/")[:2]) not in parts:
            yield path


def _files(cache: Path) -> Iterator[str]:
    """The files and folders of a cache; blocks are left out, which are caches of their own and not joined yet."""
    for folder, names, files in os.walk(cache):
        relative = Path(folder).relative_to(cache)
        names[:] = sorted(name for name in names if name != TEMPORARY and (relative / name).as_posix() != BLOCKS)
        yield from ((relative / name).as_posix() for name in sorted([*files, *names]))


def report_json(report: Report) -> dict[str, Any]:
    """What `sae-cache verify --json` prints."""
    return {
        "ok": report.ok,
        "complete": report.complete,
        "n_files": len(report.findings),
        "n_bytes": report.n_bytes,
        "problems": [{"path": finding.path, "problem": finding.problem} for finding in report.problems],
        "foreign": list(report.foreign),
    }
