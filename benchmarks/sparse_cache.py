"""A cache of any size in sparse files: every row is zero, of document 0 and at position 0, and no disk is filled."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_granary.cache.format.layout import DOCUMENTS, MANIFEST, commit_path, documents_path
from sae_granary.cache.format.manifest import DocumentRange, FileEntry, Manifest, ShardRecord, manifest_of
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.format.spec import CacheSpec, Cursor
from sae_granary.cache.format.stats import Moments
from sae_granary.common import signed
from sae_granary.common.rows import HookPoint

HOOK = "layer_6"
LINKS = 50_000  # names of a file; ext4 allows 65,000
ANY = 987_654_321  # the number of a shard in a text that is made for every one
UNKNOWN = "0" * 32  # no checksum is compared where a cache is opened or loaded


def write_sparse_cache(
    path: Path, n_shards: int, rows_per_shard: int, d_in: int = 768, *, linked: bool = False, **fingerprint: Any
) -> Path:
    """Write a complete bfloat16 cache of one hook point; `linked`: files of equal content share their data."""
    hook = HookPoint(HOOK, "encoder.layer.6", "output", 0, d_in)
    provenance = {"model": {"is_decoder": False}}
    spec = CacheSpec("token", (hook,), "bfloat16", rows_per_shard, provenance=provenance, fingerprint=fingerprint)
    manifest = manifest_of(spec, None)
    for folder in ("commits", DOCUMENTS, *(array.path for array in manifest.layout.arrays)):
        (path / folder).mkdir(parents=True)
    for shard in range(n_shards):
        _write_shard(path, manifest, shard, linked=linked)
    moments = Moments(n_shards * rows_per_shard, np.zeros(d_in), np.ones(d_in))
    complete = replace(manifest, complete=True, statistics={HOOK: moments}, zarr_files={}, summary={})
    (path / MANIFEST).write_bytes(_with_shards(complete, n_shards))
    return path


def _with_shards(manifest: Manifest, n_shards: int) -> bytes:
    """The bytes of the manifest of n whole shards: text from one record, which is ten times as fast as JSON of all."""
    data = dump_signed(replace(manifest, shards=(_record(manifest, ANY),)).to_json())
    before, first, rest = data[: -signed.TAIL_BYTES].decode().partition('  {\n   "shard"')
    record, end = (first + rest)[: -len("\n ]")], "\n ]"
    numbered = (record.replace(f"/{ANY}.p", f"/{i:08d}.p").replace(str(ANY), str(i)) for i in range(n_shards))
    head = (before + ",\n".join(numbered) + end).encode()
    tail = data[-signed.TAIL_BYTES :].replace(signed.digest(data[: -signed.TAIL_BYTES]).encode(), b"%s")
    return head + tail % signed.digest(head).encode()


def _record(manifest: Manifest, shard: int) -> ShardRecord:
    n_rows = manifest.rows_per_shard
    files = {**manifest.layout.shard_files(shard, n_rows), documents_path(shard): 1}
    entries = {name: FileEntry(n_bytes, UNKNOWN) for name, n_bytes in files.items()}
    return ShardRecord(
        shard, n_rows, shard, shard, DocumentRange(1, 0, 0), Cursor({}, 0), entries, None, FileEntry(1, UNKNOWN)
    )


def _write_shard(path: Path, manifest: Manifest, shard: int, *, linked: bool) -> None:
    n_rows = manifest.rows_per_shard
    files = {**manifest.layout.shard_files(shard, n_rows), documents_path(shard): 1}
    named = {**files, commit_path(shard): 1}
    first = shard // LINKS * LINKS
    firsts = [*manifest.layout.shard_files(first, n_rows), documents_path(first), commit_path(first)]
    for original, (name, n_bytes) in zip(firsts, named.items(), strict=True):
        if linked and original != name:
            os.link(f"{path}/{original}", f"{path}/{name}")
            continue
        with (path / name).open("wb") as file:
            file.truncate(n_bytes)
