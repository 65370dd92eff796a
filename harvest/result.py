"""What a harvest did: the numbers of the table at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.cache.format.stats import StorageError, storage_error
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.prepare import Prepared
from sae_granary.harvest.spec import not_recorded
from sae_granary.models.tokens.document import SKIP_REASONS


@dataclass(frozen=True)
class HarvestResult:
    """What a harvest did."""

    path: Path
    unit: str
    hooks: tuple[tuple[str, int], ...]  # name, d_in
    dtype: str
    n_rows: int
    n_docs: int
    n_shards: int
    n_bytes: int
    ended: str  # why it ended: max_tokens, max_docs, source
    skipped: tuple[tuple[str, int], ...]
    repaired: int
    already_complete: bool = False
    not_recorded: str = ""  # what determines the rows but was not compared: a cache of before does not tell it
    resumed_rows: int = 0
    seconds: float = 0.0  # from the first batch to the last commit; loading the model is not in it
    rows_per_second: float = 0.0
    padding: float = 0.0  # share of padded places in all batches
    busy: tuple[tuple[str, float], ...] = ()  # share of the time that each stage worked, busiest first
    warnings: tuple[str, ...] = ()
    storage_errors: tuple[tuple[str, StorageError], ...] = ()  # by hook point, of dtypes for which it is measured


def result_of(prepared: Prepared, writer: CacheWriter, summary: Mapping[str, Any]) -> HarvestResult:
    """What a complete cache holds."""
    measured = (writer.manifest.statistics or {}).items()
    return HarvestResult(
        path=writer.path,
        unit=prepared.unit,
        hooks=tuple((hook.name, hook.d_in) for hook in prepared.hooks),
        dtype=prepared.dtype,
        n_rows=writer.n_rows,
        n_docs=int(summary.get("n_documents", 0)),
        n_shards=writer.n_shards,
        n_bytes=writer.bytes_written,
        ended=str(summary.get("ended", "")),
        skipped=tuple((reason, int(summary.get(f"skipped_{reason}", 0))) for reason in SKIP_REASONS),
        repaired=int(summary.get("repaired", 0)),
        not_recorded=not_recorded(writer.manifest),
        storage_errors=tuple((hook, error) for hook, m in measured if (error := storage_error(m)) is not None),
    )


def ending_warnings(config: HarvestConfig, summary: Mapping[str, Any]) -> list[str]:
    """A source that gave less than was asked for."""
    if summary["ended"] != "source":
        return []
    asked = [
        f"{flag} {value:,}"
        for flag, value in (("--max-tokens", config.max_tokens), ("--max-docs", config.max_docs))
        if value is not None
    ]
    if not asked:
        return []
    rows, docs = summary["n_rows"], summary["n_documents"]
    return [
        f"the dataset ended before {' and '.join(asked)}: {rows:,} rows of {docs:,} documents; complete, but shorter"
    ]
