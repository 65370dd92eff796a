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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_granary.common.errors import GranaryError
from sae_granary.common.signed import CHECKSUM, Fields

CONFIG, RECORD, METRICS, SUMMARY = "config.yaml", "run.json", "metrics.jsonl", "summary.json"
CHECKPOINTS = "checkpoints"
ANALYSIS, EVALUATION = "analysis", "eval.json"  # by sae-analyze, in a folder for each cache
SAE_RECORD = "granary.json"  # type, options and metadata of the inference form
SAE_FILES = ("cfg.json", "sae_weights.safetensors", SAE_RECORD, "granary.safetensors")
RECORD_VERSION = 2  # since 2 run.json carries a checksum, and that of config.yaml


class NotARunError(GranaryError, FileNotFoundError):
    """The folder holds no run, or no finished run, that this version can read."""


class RunFields(Fields):
    """Fields of a JSON file of a run or a sweep."""

    damaged = NotARunError


def read_record(folder: Path) -> dict[str, Any]:
    """run.json: version, cache (its fingerprint), order (pinned shards, seed), counts (rows), wandb_id, config_xxh3,
    cache_paths (absolute, relative to the folder; absent in runs of earlier versions).

    Raises NotARunError, also where its checksum does not fit. One of version 1 has none.
    """
    path = folder / RECORD
    missing = f"{folder} holds no run: {RECORD} is missing"
    record = RunFields.of_file(path, "restore it from a copy, or start a new run", missing=missing, signed_since=2)
    if record.body.get("version") not in (1, RECORD_VERSION):
        expected = f"1 to {RECORD_VERSION}"
        raise NotARunError(f"{folder}: not a run of a version that this one reads (expected {expected})")
    check_stream(record)
    record.nested("cache")
    record.get("wandb_id", str)
    if record.body["version"] > 1:
        record.get("config_xxh3", str)
    return record.body


def check_stream(fields: Fields) -> None:
    """Refuse row counts and pinned shards that no run or sweep writes."""
    counts, order = fields.nested("counts"), fields.nested("order")
    for name in counts.body:
        counts.integer(name)
    for shard in order.get("shards", list):
        if not (isinstance(shard, list) and [type(n) for n in shard] == [int, int]):
            raise order.error("shards", shard, "pairs of shard and rows")
    if "cache_paths" in fields.body:
        paths = fields.nested("cache_paths")
        for name in paths.body:
            paths.get(name, str)


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run; its final metrics are under `eval`. Raises NotARunError.

    What `eval` called dead before version 0.2 is called rare: `dead` is a number of training.
    """
    path = folder / SUMMARY
    begun = (folder / RECORD).is_file()
    remedy = f"continue it with: sae-train resume {folder}" if begun else f"expected a folder with {SUMMARY}"
    summary = RunFields.of_file(path, remedy, missing=f"{folder} holds no finished run; {remedy}")
    if not isinstance(summary.body.get("eval"), dict):
        raise NotARunError(f"{path} is not the summary of a run")
    found = {name: value for name, value in summary.body.items() if name != CHECKSUM}
    return found | {"eval": {("rare" if name == "dead" else name): v for name, v in found["eval"].items()}}


def is_complete(folder: Path) -> bool:
    """Whether a run has a readable summary."""
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
    return RunFields.of_file(folder / SAE_RECORD, "restore it from a copy").optional("metadata", dict) or {}


def read_downstream(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What `sae-analyze eval --downstream` stored for a run on the held-out rows of the cache of a fingerprint.

    Empty where it was not measured; what is damaged is left out.
    """
    for path in sorted(folder.glob(f"{ANALYSIS}/*/{EVALUATION}")):
        try:
            stored = RunFields.of_file(path, "", signed_since=1, key="format")
            if stored.nested("identity").body.get("cache") == fingerprint:
                return stored.optional("downstream", dict) or {}
        except NotARunError:
            continue
    return {}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, oldest first; truncated or damaged ones are skipped."""
    try:
        text = (folder / METRICS).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return []
    return [line for line in map(_parse_line, text.split("\n")[:-1]) if line is not None]


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("step"), int) else None
