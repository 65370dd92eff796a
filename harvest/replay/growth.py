"""What an extension or an addition will add to a complete cache: rows and bytes. No weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sae_granary.cache.format.layout import DOCUMENTS, MANIFEST
from sae_granary.cache.format.manifest import Manifest, ShardRecord
from sae_granary.cache.format.records import committed, existing_manifest
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.write.disk_space import STATISTICS, array_bytes
from sae_granary.common.files import free_bytes
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.errors import SpaceError
from sae_granary.harvest.plan import Plan, estimate_seconds, plan
from sae_granary.harvest.prepare import Prepared, Say
from sae_granary.harvest.run import asks_for_more


@dataclass(frozen=True)
class Measured:
    """Bytes beside the arrays of a cache, as its files have them."""

    per_shard: float  # its record, and its part of the manifest, without statistics
    documents: float  # per row

    @classmethod
    def of(cls, manifest_bytes: int, manifest: Manifest) -> Measured:
        """Measure a complete cache, whose manifest has so many bytes."""
        records = manifest.shards
        statistics = STATISTICS * sum(hook.d_in for hook in manifest.hook_points)
        own = sum(record.record.n_bytes for record in records if record.record is not None)
        kept = sum(
            entry.n_bytes for record in records for name, entry in record.files.items() if name.startswith(DOCUMENTS)
        )
        shared = max(0.0, manifest_bytes - statistics)
        per_shard = (own + shared) / len(records) - statistics
        return cls(per_shard, kept / sum(record.n_rows for record in records))


def plan_growth(config: HarvestConfig, say: Say) -> Plan:
    """What `run` with these settings will do: of an extension, only what comes to the rows that are there."""
    whole = plan(config, say)
    have = existing_manifest(config.out_path)
    if not config.extend or have is None or not have.complete or whole.n_rows is None:
        return whole
    n_old = sum(record.n_rows for record in have.shards)
    n_rows = max(0, whole.n_rows - n_old) if asks_for_more(whole.prepared) else 0
    measured = Measured.of((config.out_path / MANIFEST).stat().st_size, have)
    n_shards = math.ceil(n_rows / have.rows_per_shard)
    if config.block_docs is not None and n_rows:  # the last block gets a second short shard
        n_shards = max(n_shards, (whole.n_shards or 0) - len(have.shards) + 1)
    statistics = STATISTICS * sum(hook.d_in for hook in have.hook_points)
    arrays = array_bytes(have.layout, n_rows, n_shards)
    n_bytes = arrays + n_shards * (measured.per_shard + statistics) + n_rows * measured.documents
    source = f"{n_old:,} are there; {whole.rows_from}"
    seconds = estimate_seconds(whole.prepared, n_rows)
    return replace(whole, n_rows=n_rows, rows_from=source, n_bytes=round(n_bytes), n_shards=n_shards, seconds=seconds)


def plan_addition(base: Cache, prepared: Prepared) -> Plan:
    """What `sae-harvest add` will do: rows and documents are those of the cache, as hard links."""
    rest, n_bytes = _addition(base, prepared)
    n_rows = sum(record.n_rows for record in rest)
    return Plan(
        prepared=prepared, n_rows=n_rows, rows_from=f"those of {base.path}", n_bytes=n_bytes,
        n_shards=len(rest), free_bytes=free_bytes(prepared.config.out_path),
        seconds=estimate_seconds(prepared, n_rows),
    )  # fmt: skip


def check_addition_space(base: Cache, prepared: Prepared) -> None:
    """Raise SpaceError for an addition whose planned size is more than the disk has free."""
    needed, free = _addition(base, prepared)[1], free_bytes(base.path)
    if needed > free:
        raise SpaceError(
            f"not enough space for {prepared.config.out_path}: {needed:,} bytes are planned and {free:,} are free; "
            "add fewer hook points, or free some space"
        )


def _addition(base: Cache, prepared: Prepared) -> tuple[Sequence[ShardRecord], int]:
    """The shards whose rows an addition lacks, and the bytes that it takes on them."""
    out = prepared.config.out_path
    have = existing_manifest(out)
    done = 0 if have is None else len(committed(out, have)[1])
    rest = base.records[done:]
    measured = Measured.of((base.path / MANIFEST).stat().st_size, base.manifest)
    statistics = STATISTICS * sum(hook.d_in for hook in prepared.hooks)
    arrays = sum(array.shard_bytes(record.n_rows) for array in prepared.layout.hook_arrays for record in rest)
    return rest, round(arrays + len(rest) * (measured.per_shard + statistics))
