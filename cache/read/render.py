"""Descriptions of a cache: facts as text, HTML and JSON."""

from __future__ import annotations

import html as html_module
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_granary.cache.format.manifest import Manifest, ShardRecord
from sae_granary.cache.format.records import InBlocks, blocks_of, bytes_in_blocks
from sae_granary.cache.format.stats import Stats
from sae_granary.common.errors import printable
from sae_granary.common.quantities import byte_size, counted

MAX_LINES, MAX_CHARACTERS = 200, 2000  # of provenance on a terminal, and of each of its values


def facts(path: Path, manifest: Manifest, opened: Sequence[ShardRecord], n_shards: int, n_bytes: int) -> dict[str, str]:
    """Label -> value, what `repr` and `sae-cache info` show of the opened shards of all committed ones."""
    unit = "text" if manifest.unit == "text" else "token"
    state = "complete" if manifest.complete else "incomplete"
    part = "" if len(opened) == n_shards else f" of {n_shards}"
    n_rows = sum(record.n_rows for record in opened)
    lines = {
        "path": str(path),
        "state": f"{state}, format {manifest.version}",
        "rows": f"{n_rows:,} (one per {unit}) from {_n_documents(opened):,} documents",
        "hook points": ", ".join(f"{hook.name} (d_in {hook.d_in})" for hook in manifest.hook_points),
        "dtype": manifest.dtype,
        "shards": f"{len(opened)}{part} of up to {manifest.rows_per_shard:,} rows",
        "size": byte_size(n_bytes + bytes_in_blocks(path)),
    }
    if (blocks := unjoined(path, manifest, opened)) is not None:
        there = counted(blocks.n_blocks, "complete block")
        lines["rows"] = f"{blocks.n_rows:,} (one per {unit}) in {there}, not joined yet"
    if manifest.kept_columns:
        lines["kept columns"] = ", ".join(manifest.kept_columns)
    for name in ("model", "dataset"):
        value = source_name(manifest.provenance.get(name))
        if value:
            lines[name] = value
    return lines


def unjoined(path: Path, manifest: Manifest, opened: Sequence[ShardRecord]) -> InBlocks | None:
    """The blocks of a harvest in blocks that has not finished; None for any other cache."""
    return None if manifest.complete or manifest.block_docs is None or opened else blocks_of(path)


def source_name(value: Any) -> str:
    """A model or dataset of the provenance in one line: its id or name, and revision."""
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    name = str(value.get("id") or value.get("name") or "")
    revision = value.get("revision")
    return f"{name} @ {str(revision)[:12]}" if name and revision else name


def text(lines: Mapping[str, str]) -> str:
    """Facts as the repr of a cache."""
    width = max(len(label) for label in lines)
    rows = (f"  {label:<{width}}  {printable(value)}" for label, value in lines.items())
    return "\n".join(["Activation cache", *rows])


def html(lines: Mapping[str, str]) -> str:
    """Facts as the repr of a cache in a notebook; everything is escaped."""
    rows = "".join(
        f'<tr><th style="text-align:left">{html_module.escape(label)}</th>'
        f'<td style="text-align:left">{html_module.escape(value)}</td></tr>'
        for label, value in lines.items()
    )
    return f"<table><caption>Activation cache</caption>{rows}</table>"


def as_json(
    path: Path, manifest: Manifest, opened: Sequence[ShardRecord], statistics: Mapping[str, Stats]
) -> dict[str, Any]:
    """What `sae-cache info --json` prints; `statistics` by hook point."""
    blocks = unjoined(path, manifest, opened)
    return {
        "path": str(path),
        "complete": manifest.complete,
        "unit": manifest.unit,
        "dtype": manifest.dtype,
        "n_rows": sum(record.n_rows for record in opened) if blocks is None else blocks.n_rows,
        "n_shards": len(opened),
        "n_documents": _n_documents(opened),
        "n_bytes": sum(record.n_bytes for record in opened),
        "rows_per_shard": manifest.rows_per_shard,
        "hook_points": [dict(vars(hook)) for hook in manifest.hook_points],
        "kept_columns": list(manifest.kept_columns),
        "provenance": dict(manifest.provenance),
        "fingerprint": dict(manifest.fingerprint),
        "summary": dict(manifest.summary or {}),
        "statistics": {hook: _stats_json(stats) for hook, stats in statistics.items()},
    }


def _n_documents(opened: Sequence[ShardRecord]) -> int:
    return sum(record.documents.n for record in opened if record.documents is not None)


def _stats_json(stats: Stats) -> dict[str, Any]:
    error = stats.storage_error
    return {
        **({} if error is None else {"storage_error": asdict(error)}),
        "mean_sq_norm": stats.mean_sq_norm,
        "total_variance": stats.total_variance,
        "norm_quantiles": {f"{fraction:g}": value for fraction, value in stats.norm_quantiles.items()},
    }


def provenance_lines(manifest: Manifest) -> dict[str, str]:
    """Label -> value: the rest of the provenance and the harvest's summary, nested fields by dotted names."""
    known = {"model", "dataset"}
    rest = {name: value for name, value in manifest.provenance.items() if name not in known}
    lines = _flat("", {**rest, **(manifest.summary or {})})
    more = {"...": f"{len(lines) - MAX_LINES:,} more: --json prints all"} if len(lines) > MAX_LINES else {}
    return dict(lines[:MAX_LINES]) | more


def stats_cells(hook: str, stats: Stats) -> list[str]:
    """One row of the table of statistics."""
    quantiles = [stats.norm_quantiles[fraction] for fraction in (0.0, 0.01, 0.5, 0.99, 1.0)]
    return [hook, *(f"{value:.4g}" for value in (stats.mean_sq_norm, stats.total_variance, *quantiles))]


def error_lines(statistics: Mapping[str, Stats]) -> dict[str, str]:
    """Label -> value: what storing cost, of dtypes for which it is measured."""
    errors = {hook: stats.storage_error for hook, stats in statistics.items() if stats.storage_error is not None}
    return {"storage FVU": "; ".join(f"{hook} {error}" for hook, error in errors.items())} if errors else {}


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, dict):
        text = str(value)
        return [(prefix, text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ...")]
    return [line for key, part in value.items() for line in _flat(f"{prefix}.{key}" if prefix else str(key), part)]
