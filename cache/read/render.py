"""A cache described: one page of facts as text, HTML and JSON."""

from __future__ import annotations

import html as html_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_granary.cache.read.reader import Cache


def facts(cache: Cache) -> dict[str, str]:
    """Label -> value, what `repr` and `sae-cache info` show."""
    records = cache.opened
    documents = sum(record.documents.n for record in records if record.documents is not None)
    row = "text" if cache.unit == "text" else "token"
    state = "complete" if cache.complete else "incomplete"
    part = "" if len(records) == len(cache.records) else f" of {len(cache.records)}"
    lines = {
        "path": str(cache.path),
        "state": f"{state}, format 1",
        "rows": f"{cache.n_rows:,} (one per {row}) from {documents:,} documents",
        "hook points": ", ".join(f"{hook.name} (d_in {hook.d_in})" for hook in cache.hook_points.values()),
        "dtype": cache.dtype,
        "shards": f"{len(records)}{part} of up to {cache.manifest.rows_per_shard:,} rows",
        "size": size(cache.n_bytes),
    }
    for name in ("model", "dataset"):
        value = source_name(cache.manifest.provenance.get(name))
        if value:
            lines[name] = value
    return lines


def source_name(value: Any) -> str:
    """A model or dataset of the provenance in one line: its id or name, and revision."""
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    name = str(value.get("id") or value.get("name") or "")
    revision = value.get("revision")
    return f"{name} @ {str(revision)[:12]}" if name and revision else name


def size(n_bytes: int) -> str:
    """Bytes in the largest unit of 1024 that keeps at least one before the point."""
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def text(cache: Cache) -> str:
    """The repr of a cache."""
    lines = facts(cache)
    width = max(len(label) for label in lines)
    return "\n".join(["Activation cache", *(f"  {label:<{width}}  {value}" for label, value in lines.items())])


def html(cache: Cache) -> str:
    """The repr of a cache in a notebook; everything is escaped."""
    rows = "".join(
        f'<tr><th style="text-align:left">{html_module.escape(label)}</th>'
        f'<td style="text-align:left">{html_module.escape(value)}</td></tr>'
        for label, value in facts(cache).items()
    )
    return f"<table><caption>Activation cache</caption>{rows}</table>"


def as_json(cache: Cache) -> dict[str, Any]:
    """What `sae-cache info --json` prints."""
    manifest = cache.manifest
    return {
        "path": str(cache.path),
        "complete": cache.complete,
        "unit": cache.unit,
        "dtype": cache.dtype,
        "n_rows": cache.n_rows,
        "n_shards": len(cache.opened),
        "n_documents": sum(record.documents.n for record in cache.opened if record.documents is not None),
        "n_bytes": cache.n_bytes,
        "rows_per_shard": manifest.rows_per_shard,
        "hook_points": [dict(vars(hook)) for hook in manifest.hook_points],
        "provenance": dict(manifest.provenance),
        "fingerprint": dict(manifest.fingerprint),
        "summary": dict(manifest.summary or {}),
        "statistics": {hook: _stats_json(cache, hook) for hook in cache.hook_points} if cache.n_rows else {},
    }


def _stats_json(cache: Cache, hook: str) -> dict[str, Any]:
    stats = cache.stats(hook)
    return {
        "mean_sq_norm": stats.mean_sq_norm,
        "total_variance": stats.total_variance,
        "norm_quantiles": {f"{fraction:g}": value for fraction, value in stats.norm_quantiles.items()},
    }


def provenance_lines(cache: Cache) -> dict[str, str]:
    """Label -> value: the rest of the provenance and the harvest's summary, nested fields by dotted names."""
    manifest = cache.manifest
    known = {"model", "dataset"}
    rest = {name: value for name, value in manifest.provenance.items() if name not in known}
    return dict(_flat("", {**rest, **(manifest.summary or {})}))


def stats_cells(cache: Cache, hook: str) -> list[str]:
    """One row of the table of statistics."""
    stats = cache.stats(hook)
    quantiles = [stats.norm_quantiles[fraction] for fraction in (0.0, 0.01, 0.5, 0.99, 1.0)]
    return [hook, *(f"{value:.4g}" for value in (stats.mean_sq_norm, stats.total_variance, *quantiles))]


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if not isinstance(value, dict):
        return [(prefix, str(value))]
    return [line for key, part in value.items() for line in _flat(f"{prefix}.{key}" if prefix else str(key), part)]
