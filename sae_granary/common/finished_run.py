"""The record of a run, which training writes and every later stage reads.

runs/<name>/
    config.yaml              every setting, resolved
    run.json                 pinned shards, row accounting, the cache that it was trained on
    metrics.jsonl            one line per `log_every` steps
    checkpoints/step_N/      native form and trainer state
    cfg.json  sae_weights.safetensors  granary.json  granary.safetensors      the SAE in inference form
    summary.json             written last: the run is complete
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_granary.common.errors import GranaryError

CONFIG, RECORD, METRICS, SUMMARY = "config.yaml", "run.json", "metrics.jsonl", "summary.json"
CHECKPOINTS = "checkpoints"
SAE_RECORD = "granary.json"  # type, options and metadata of the inference form
SAE_FILES = ("cfg.json", "sae_weights.safetensors", SAE_RECORD, "granary.safetensors")
RECORD_VERSION = 1


class NotARunError(GranaryError, FileNotFoundError):
    """The folder holds no run, or no finished run, that this version can read."""


def read_record(folder: Path) -> dict[str, Any]:
    """run.json: version, cache (its fingerprint), order (pinned shards, seed), counts (rows), wandb_id.

    Raises NotARunError.
    """
    record = _read_json(folder / RECORD, f"{folder} holds no run: {RECORD} is missing")
    if record.get("version") != RECORD_VERSION:
        raise NotARunError(f"{folder}: not a run of a version that this one reads (expected {RECORD_VERSION})")
    if missing := [key for key in ("counts", "cache", "order", "wandb_id") if key not in record]:
        raise NotARunError(f"{folder / RECORD} is damaged: {missing[0]} is missing")
    return record


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run; its final metrics are under `eval`. Raises NotARunError."""
    begun = (folder / RECORD).is_file()
    remedy = f"continue it with: sae-train resume {folder}" if begun else f"expected a folder with {SUMMARY}"
    summary = _read_json(folder / SUMMARY, f"{folder} holds no finished run; {remedy}")
    if not isinstance(summary.get("eval"), dict):
        raise NotARunError(f"{folder / SUMMARY} is not the summary of a run")
    return summary


def is_complete(folder: Path) -> bool:
    """Whether a run wrote a summary that can be read."""
    try:
        read_summary(folder)
    except NotARunError:
        return False
    return True


def read_metadata(folder: Path) -> dict[str, Any]:
    """Where the SAE of a run belongs: model_name, hook_name, cache_fingerprint, ...; empty without such a record.

    Raises NotARunError if the record is damaged.
    """
    if not (folder / SAE_RECORD).is_file():
        return {}
    return dict(_read_json(folder / SAE_RECORD, "").get("metadata", {}))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first; those that a kill cut off or that are damaged are left out."""
    path = folder / METRICS
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in map(_parse_line, text.split("\n")[:-1]) if line is not None]


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotARunError(missing) from None
    except (OSError, ValueError) as error:
        raise NotARunError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise NotARunError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
