"""Runs -> the facts of a page, and the page on disk.

facts: {"title", "version", "runs": [see `run_facts`, with "density" and "link"], "latents": about | None,
        "cache": ..., "evaluation", "thresholds", "routing", "notes"}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from sae_granary import __version__
from sae_granary.analyze.encoding.codes import StoredCodes
from sae_granary.analyze.errors import DamagedCodesError, MismatchError
from sae_granary.analyze.evaluation.stored import load_evaluation
from sae_granary.analyze.latents.stats import RECORD, LatentStats, read_stats
from sae_granary.analyze.report.latent_data import latent_data
from sae_granary.analyze.report.page import render, write_page
from sae_granary.analyze.report.run_facts import run_facts
from sae_granary.analyze.source import Source, hash_of
from sae_granary.common.finished_run import read_metadata
from sae_granary.common.threads import waiting
from sae_granary.sae_core import load
from sae_granary.sae_core.latents import latent_numbers

FILE = "report.html"
N_BINS = 40


def report_run(
    folder: Path, out: Path, stats: LatentStats, source: Source | None = None, codes: StoredCodes | None = None
) -> dict[str, Any]:
    """Write the page of one run, with its latents, and return its facts.

    Without source and codes (the cache is gone) the examples of the latents have no texts.
    """
    with waiting("collecting the examples of the latents"):
        data = latent_data(stats, None if source is None else source.cache, codes)
    run = run_facts(folder) | {"density": log_histogram(stats.density), "silent": int((stats.fired == 0).sum())}
    if source is not None:
        run = run | {
            "type": source.sae.type_name,
            "d_in": source.sae.config.d_in,
            "d_sae": source.sae.config.d_sae,
            "hook": ", ".join(source.hooks),
            "model": source.cache.manifest.fingerprint.get("model"),
            "cache": str(source.cache.path),
        }
        run |= {"thresholds": thresholds_of(source), **_evaluation(source, run)}
    facts = _facts(str(run["name"]), [run]) | {"latents": dict(data.about)}
    write_page(out, render(facts, data.blobs))
    return facts


def report_comparison(folders: Sequence[Path], out: Path, title: str) -> dict[str, Any]:
    """Write a page that compares runs, with a link to the report of each that has one; return its facts."""
    runs = []
    for folder in folders:
        link = folder / FILE
        where = os.path.relpath(link, out.parent).replace(os.sep, "/")
        runs.append(run_facts(folder) | {"link": f"./{quote(where)}" if link.is_file() else None})
    caches = {json.dumps(read_metadata(folder).get("cache_fingerprint"), sort_keys=True) for folder in folders}
    notes = (
        ["These runs were trained on different caches: their numbers cannot be compared."] if len(caches) > 1 else []
    )
    facts = _facts(title, runs) | {"latents": None, "notes": notes}
    write_page(out, render(facts))
    return facts


def stored_stats(folder: Path) -> LatentStats | None:
    """The newest statistics of an SAE on its training cache, for when the cache is gone; None if there are none."""
    found = sorted(folder.glob(f"analysis/*/stats/{RECORD}"), key=lambda path: -path.stat().st_mtime)
    wanted = {"sae": hash_of(load(folder, "cpu")), "cache": read_metadata(folder).get("cache_fingerprint")}
    for path in found:
        with suppress(MismatchError, DamagedCodesError):
            return read_stats(path.parent, wanted)
    return None


def _evaluation(source: Source, run: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of an evaluation stored by `sae-analyze eval`: groups, hook points, metrics that the run lacks."""
    found = load_evaluation(source)
    if found is None:
        return {}
    groups = [[f"{found['part']}, {found['n_rows']:,} rows", list(found["metrics"].items())]]
    if found["downstream"]:
        groups.append(["downstream", list(found["downstream"].items())])
    for name in ("by_position", "by_token_class"):
        rows = found[name] or []
        told = [[row["group"], f"{_number(row['fvu'])} / {_number(row['l0'])}"] for row in rows if row["n_rows"]]
        if told:
            groups.append([f"{name.replace('_', ' ')}: FVU / L0", told])
    lacking = {name: found["metrics"].get(name) for name in ("l0", "fvu") if run.get(name) is None}
    return {"evaluation": groups, "routing": found["routing"], **lacking}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _facts(title: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"title": title, "version": __version__, "runs": runs}


def log_histogram(values: NDArray[Any]) -> dict[str, list[float]] | None:
    """{"edges" (N_BINS + 1,): log10, "counts" (N_BINS,)} of the positive values; None if there are none."""
    positive = values[values > 0].astype(np.float64)
    if not len(positive):
        return None
    counts, edges = np.histogram(np.log10(positive), bins=N_BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def thresholds_of(source: Source) -> dict[str, Any] | None:
    """The thresholds of the latents as a histogram, or {"shared": number} where all have one; None for other types."""
    found = latent_numbers(source.sae.core).get("threshold")
    if found is None:
        return None
    values = found.float().cpu().numpy()
    if len(np.unique(values)) == 1:
        return {"shared": float(values[0])}
    return log_histogram(values)
