"""Finished runs side by side: finding them, and a row of numbers for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_granary import sae_core
from sae_granary.common.errors import ConfigError, GranaryError, nearest
from sae_granary.common.finished_run import RECORD, NotARunError, read_downstream, read_record, read_summary
from sae_granary.train.folders import is_sweep, read_run
from sae_granary.train.sweeps.sweep_plan import load_plan

Row = dict[str, Any]

MEASURED = ("l0_train", "steps", "tokens", "tokens_per_second", "seconds", "rejected")  # of a summary, beside `eval`


def find_runs(folders: Sequence[Path]) -> tuple[list[Path], list[NotARunError]]:
    """The finished runs among folders, each once, and why others are none.

    A folder is a run, a sweep, or holds some (`runs/`); what else it holds is passed over. Raises NotARunError where no
    run is left, or a folder does not exist.
    """
    found: dict[Path, Path] = {}
    skipped = []
    for run in [run for folder in folders for run in _runs_in(folder)]:
        try:
            read_summary(run)
            found.setdefault(run.resolve(), run)
        except NotARunError as error:
            skipped.append(error)
    if skipped and (not found or any(not folder.exists() for folder in folders)):
        raise skipped[0]
    return list(found.values()), skipped


def _runs_in(folder: Path) -> list[Path]:
    """The runs in a folder; the folder itself if nothing in it looks like a run."""
    if is_sweep(folder):
        return [folder / entry.name for entry in load_plan(folder).entries]
    if (folder / RECORD).is_file() or not folder.is_dir():
        return [folder]
    inner = [path for path in sorted(folder.iterdir()) if is_sweep(path) or (path / RECORD).is_file()]
    return [run for path in inner for run in _runs_in(path)] or [folder]


def comparison_rows(runs: Sequence[Path]) -> list[Row]:
    """One flat row per finished run: what it was trained on, its settings and its metrics.

    Runs, and caches, with equal names are distinguished by their paths.
    """
    rows = [_row(folder) for folder in runs]
    caches = [Path(path).name for path in {row["cache_path"] for row in rows}]
    names = [row["name"] for row in rows]
    for row in rows:
        cache = Path(row["cache_path"]).name
        row["cache"] = cache if caches.count(cache) == 1 else row["cache_path"]
        row["name"] = row["name"] if names.count(row["name"]) == 1 else row["folder"]
    return rows


def _row(folder: Path) -> Row:
    summary, fingerprint = read_summary(folder), _fingerprint(folder)
    numbers = {**summary["eval"]}
    for name, value in read_downstream(folder, fingerprint).items():
        numbers.setdefault(name, value)
    return {
        "name": str(summary["name"]),
        "folder": str(folder),
        "status": "finished",
        "type": str(summary["type"]),
        "hook": ",".join(summary.get("hook", ())),
        "cache": "",
        "cache_path": str(summary.get("cache", "")),
        "d_sae": summary["d_sae"],
        "k": summary.get("k"),
        "target": _target(folder, summary),
        **{name: summary.get(name) for name in MEASURED},
        **numbers,
        "dead": summary["dead"],
        "eval_part": summary.get("eval_part"),
        "notes": "; ".join(summary.get("notes", ())),
    }


def _fingerprint(folder: Path) -> Mapping[str, Any]:
    """Fingerprint of a run's cache; empty if its record cannot be read, which a finished run does not need."""
    try:
        fingerprint: Mapping[str, Any] = read_record(folder)["cache"]
    except NotARunError:
        return {}
    return fingerprint


def _target(folder: Path, summary: Mapping[str, Any]) -> str:
    """The option that decides a run's sparsity, and its value."""
    try:
        config = read_run(folder)[0]
        return sae_core.make_config(sae_core.registry.get(config.type), config.options).target
    except GranaryError:  # a finished run does not need its settings any more
        return "" if summary.get("k") is None else f"k={summary['k']}"


def warnings(runs: Sequence[Path], rows: Sequence[Row]) -> list[str]:
    """Reasons why the numbers of some runs cannot be compared."""
    caches: dict[str, list[Row]] = {}
    for folder, row in zip(runs, rows, strict=True):
        caches.setdefault(repr(sorted(_fingerprint(folder).items())), []).append(row)
    found = []
    if len(caches) > 1:
        names = ", ".join(dict.fromkeys(str(group[0]["cache_path"]) for group in caches.values()))
        found.append(f"the runs are of {len(caches)} caches ({names}): compare L0, FVU and CE score within one only")
    for group in caches.values():
        counts = {row["eval_part"]: row for row in group}
        if len(counts) > 1:
            found.append(
                f"some runs on {group[0]['cache_path']} are evaluated on training rows, others on held-out ones"
            )
    return found


def sort_rows(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows by a column, smallest first, or with a `-` in front largest first; those without a value last.

    Raises ConfigError for a column that no row has.
    """
    descending, name = column.startswith("-"), column.removeprefix("-").strip().lower().replace(" ", "_")
    known = list(dict.fromkeys(key for row in rows for key in row))
    if name not in known:
        raise ConfigError(f"--sort {column}: expected a column: {', '.join(known)}{nearest(name, known)}")
    there = [row for row in rows if row.get(name) is not None]
    texts = any(isinstance(row[name], str) for row in there)
    there.sort(key=lambda row: str(row[name]) if texts else row[name], reverse=descending)
    return there + [row for row in rows if row.get(name) is None]
