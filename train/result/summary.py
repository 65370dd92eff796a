"""summary.json of a finished run, and the metadata of the SAE's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sae_granary.cache.format.stats import storage_error
from sae_granary.common.finished_run import read_metrics
from sae_granary.models.language.losses import notes_on
from sae_granary.train.data.run_data import RunData
from sae_granary.train.result.notes import remarks, slow_rows
from sae_granary.train.state.checkpoint import best_checkpoint
from sae_granary.train.state.clock import Clock
from sae_granary.train.state.run_state import Run


def summarize(
    run: Run, data: RunData, folder: Path, numbers: Mapping[str, float | None], clock: Clock
) -> dict[str, Any]:
    """summary.json: what was trained, and its metrics."""
    config, seconds = data.config, clock.seconds
    summary = {
        "name": config.name,
        "type": config.type,
        "cache": config.cache,
        "hook": list(config.hook),
        "d_in": config.options["d_in"],
        "d_sae": config.options["d_sae"],
        "k": config.options.get("k"),
        "steps": run.step,
        "tokens": run.tokens,
        "rejected": run.rejected,
        "l0_train": _last_training_l0(folder),
        "dead": float(run.sae.shards.average(run.sae.dead_mask.float().mean())),
        "dead_threshold": config.dead_threshold,
        "dead_after_tokens": config.options.get("dead_after_tokens"),
        "eval_part": data.eval_part,
        "eval": dict(numbers),
        "rows": data.counts.to_json(),
        "storage_error": _storage_errors(data),
        "device": config.device,
        "versions": {"torch": torch.__version__},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(run.tokens / max(seconds, 1e-9), 1),
    }
    notes = remarks(summary, wanted_l0=run.sae.config.wanted_l0, warmup_steps=config.warmup_steps or 0)
    summary["notes"] = [*run.notes, *notes_on(numbers), *notes, *slow_rows(*clock.waited)]
    if config.keep_best and (best := best_checkpoint(folder)):
        summary["best_checkpoint"] = best.name
    return summary


def _storage_errors(data: RunData) -> dict[str, Any] | None:
    """By hook point: what the rows lost when they were stored, where that was measured; no FVU is better than it."""
    errors = {hook: storage_error(data.cache.moments(hook)) for hook in data.config.hook}
    return {hook: asdict(error) for hook, error in errors.items() if error is not None} or None


def _last_training_l0(folder: Path) -> float | None:
    """L0 of the training activation on the last measured batch."""
    values = [line["l0"] for line in read_metrics(folder) if "l0" in line]
    return float(values[-1]) if values else None


def export_metadata(data: RunData, folder: Path) -> dict[str, Any]:
    """Metadata for `cfg.json`: the model and hook point that the SAE belongs to."""
    manifest = data.cache.manifest
    model, windows = manifest.model, manifest.provenance.get("windows") or {}
    points = [data.cache.hook_points[name] for name in data.config.hook]
    metadata: dict[str, Any] = {
        "model_name": model.get("id"),
        "model_revision": model.get("revision"),
        "hook_name": ",".join(_saelens_hook(p.name) for p in points),
        "hf_hook_name": ",".join(p.module for p in points),
        "hook_points": [p.name for p in points],
        # What SAELens' tools ask for: its activation store, its evaluation.
        "dataset_path": manifest.fingerprint.get("dataset"),
        "context_size": windows.get("ctx_len"),
        "prepend_bos": bool(windows.get("prefix")),
        "model_from_pretrained_kwargs": {},
        "cache_fingerprint": dict(manifest.fingerprint),
        "run": folder.name,
    }
    if data.config.keep_first_position is False:  # a store that reads it would evaluate on attention sinks
        metadata["seqpos_slice"] = [1, None]
    return metadata


def _saelens_hook(name: str) -> str:
    """layer_6 -> blocks.6.hook_resid_post, the name in SAELens and TransformerLens; other names are unchanged."""
    layer = name.removeprefix("layer_")
    return f"blocks.{layer}.hook_resid_post" if layer.isdigit() else name
