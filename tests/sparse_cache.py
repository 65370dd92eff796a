"""A cache of any size in sparse files: every row is zero, of document 0 and at position 0, and no disk is filled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sae_granary.cache.format.layout import DOCUMENTS, MANIFEST, commit_path, documents_path
from sae_granary.cache.format.manifest import DocumentRange, FileEntry, Manifest, ShardRecord, manifest_of
from sae_granary.cache.format.signed import dump_signed
from sae_granary.cache.format.spec import CacheSpec, Cursor
from sae_granary.cache.format.stats import Moments
from sae_granary.common.rows import HookPoint

HOOK = "layer_6"
UNKNOWN = "0" * 32  # no checksum is compared where a cache is opened or loaded


def write_sparse_cache(path: Path, n_shards: int, rows_per_shard: int, d_in: int = 768, **fingerprint: Any) -> Path:
    """Write a complete bfloat16 cache of one hook point."""
    hook = HookPoint(HOOK, "encoder.layer.6", "output", 0, d_in)
    provenance = {"model": {"is_decoder": False}}
    spec = CacheSpec("token", (hook,), "bfloat16", rows_per_shard, provenance=provenance, fingerprint=fingerprint)
    manifest = manifest_of(spec, None)
    for folder in ("commits", DOCUMENTS, *(array.path for array in manifest.layout.arrays)):
        (path / folder).mkdir(parents=True)
    shards = tuple(_write_shard(path, manifest, shard) for shard in range(n_shards))
    moments = Moments(n_shards * rows_per_shard, np.zeros(d_in), np.ones(d_in))
    complete = replace(manifest, complete=True, shards=shards, statistics={HOOK: moments}, zarr_files={}, summary={})
    (path / MANIFEST).write_bytes(dump_signed(complete.to_json()))
    return path


def _write_shard(path: Path, manifest: Manifest, shard: int) -> ShardRecord:
    n_rows = manifest.rows_per_shard
    files = {**manifest.layout.shard_files(shard, n_rows), documents_path(shard): 1}
    for name, n_bytes in {**files, commit_path(shard): 1}.items():
        with (path / name).open("wb") as file:
            file.truncate(n_bytes)
    entries = {name: FileEntry(n_bytes, UNKNOWN) for name, n_bytes in files.items()}
    return ShardRecord(
        shard, n_rows, shard, shard, DocumentRange(1, 0, 0), Cursor({}, 0), entries, None, FileEntry(1, UNKNOWN)
    )
