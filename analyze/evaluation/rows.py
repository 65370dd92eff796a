"""The rows of a cache on which an SAE is evaluated: the filters and held-out documents of its training.

A run records them in config.yaml. Other SAEs use the defaults: no special tokens, no position 0 for decoders, 5 % of
the documents held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from sae_granary.analyze.errors import AnalyzeError
from sae_granary.analyze.source import Source
from sae_granary.cache.load.selection import Counts, Filters, Holdout, Part, Selection, account
from sae_granary.common.errors import one_line
from sae_granary.common.files import read_regular
from sae_granary.common.finished_run import CONFIG, RECORD, NotARunError, read_metadata, read_record
from sae_granary.common.signed import digest
from sae_granary.sae_core.metrics import DEAD_THRESHOLD

NEIGHBOR_POSITION = 2  # a type that reads the row before each row was trained from this position on


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that an evaluation reuses; defaults for an SAE without a run."""

    filters: Filters = field(default_factory=Filters)
    holdout: Holdout = field(default_factory=Holdout)
    dead_threshold: float = DEAD_THRESHOLD
    model: str | None = None  # where the run was told that the language model is


def read_settings(folder: Path) -> RunSettings:
    """The settings of a run's folder. Raises NotARunError for one whose config.yaml is missing or was changed."""
    if not (folder / RECORD).is_file():
        return RunSettings()
    sections, default = _config(folder), RunSettings()
    data, training, logging = (sections.get(name) or {} for name in ("data", "training", "logging"))
    try:
        filters = Filters(
            special=bool(data.get("keep_special", False)),
            first_position=data.get("keep_first_position"),
            exclude_tokens=tuple(data.get("exclude_tokens") or ()),
            **{name: data.get(name) for name in ("min_position", "max_position", "min_norm", "max_norm")},
        )
        holdout = Holdout(
            float(data.get("holdout", default.holdout.fraction)), int(data.get("holdout_seed", default.holdout.seed))
        )
        threshold = float(logging.get("dead_threshold", default.dead_threshold))
    except (AttributeError, TypeError, ValueError) as error:
        raise NotARunError(f"{folder / CONFIG} holds other settings than a run writes: {one_line(error)}") from None
    return RunSettings(filters, holdout, threshold, training.get("lm"))


def _config(folder: Path) -> Mapping[str, Any]:
    """config.yaml of a run, unaltered."""
    path, record = folder / CONFIG, read_record(folder)
    remedy = "restore the file from a copy"
    try:
        data = read_regular(path)
        content = yaml.safe_load(data.decode())
    except FileNotFoundError:
        raise NotARunError(f"{folder} holds no run: {CONFIG} is missing; {remedy}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise NotARunError(f"{path} cannot be read: {one_line(error)}; {remedy}") from None
    if digest(data) != record.get("config_xxh3", digest(data)):
        raise NotARunError(f"{path} was changed since the run started, so which rows it held out is unknown; {remedy}")
    if not isinstance(content, dict) or not all(isinstance(value, dict | None) for value in content.values()):
        raise NotARunError(f"{path} holds no settings; {remedy}")
    return content


def choose_rows(source: Source, part: Part, settings: RunSettings) -> tuple[Selection, Counts]:
    """The selection of a part of the cache, resolved, and the account of all rows.

    Raises AnalyzeError if the part has no rows.
    """
    filters = settings.filters
    if source.sae.reads.previous:
        filters = replace(filters, min_position=max(filters.min_position or 0, NEIGHBOR_POSITION))
    selection = Selection(filters, settings.holdout, part).resolve(source.cache)
    counts = account(source.cache, selection, source.hooks)
    if not counts.of(part):
        raise AnalyzeError(_nothing_left(source, part, settings.holdout, counts))
    return selection, counts


def _nothing_left(source: Source, part: Part, holdout: Holdout, counts: Counts) -> str:
    if part == "heldout" and counts.of("all"):
        return (
            f"{source.cache.path} has no held-out rows for {source.folder}: {holdout.fraction:.3g} of its documents "
            "are held out, which came to none; evaluate on other rows with --part train or --part all"
        )
    dropped = ", ".join(f"{name} {n:,}" for name, n in counts.to_json().items() if n and name != "total")
    return (
        f"{source.cache.path} has no {part} rows for {source.folder}: of {counts.total:,} rows ({dropped or 'none'}); "
        "give a cache with other rows, or another --part"
    )


def trained_elsewhere(source: Source) -> bool:
    """Whether a record says that the SAE was trained on another cache."""
    trained = read_metadata(source.folder).get("cache_fingerprint")
    return trained is not None and trained != source.cache.manifest.fingerprint
