"""Results of a sweep: one row per SAE, as CSV, Markdown and JSON, and the Pareto plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_granary.common import files
from sae_granary.common.finished_run import NotARunError, RunFields, is_complete, read_summary
from sae_granary.train.folders import FAILURE
from sae_granary.train.sweeps.sweep_plan import Entry, Plan

Row = Mapping[str, Any]

CSV_FILE, MARKDOWN_FILE, JSON_FILE, PLOT_FILE = "results.csv", "results.md", "results.json", "pareto.png"
MARKDOWN_COLUMNS = ("name", "type", "hook", "d_sae", "k", "init_seed", "l0", "fvu", "dead", "tokens", "seconds")
DOWNSTREAM_COLUMNS = ("ce_score", "kl")  # shown where a run measured them


@dataclass(frozen=True)
class SweepResult:
    """The folder of a sweep and its table: one row per SAE."""

    folder: Path
    rows: Sequence[Row]

    @property
    def failures(self) -> dict[str, str]:
        """Name -> error of those that have no result."""
        return {str(row["name"]): str(row["error"]) for row in self.rows if row.get("error")}


def sweep_rows(plan: Plan, folder: Path) -> list[Row]:
    """One flat row per SAE, in the plan's order; one without a result says why."""
    return [_row(entry, folder / entry.name) for entry in plan.entries]


def _row(entry: Entry, folder: Path) -> Row:
    config = entry.config
    row: dict[str, Any] = {
        "name": entry.name,
        "type": config.type,
        "hook": ",".join(config.hook),
        "d_sae": config.options["d_sae"],
        "k": config.options.get("k"),
        "init_seed": config.init_seed,
        "shuffle_seed": config.shuffle_seed,
        **{key: _plain(value) for key, value in entry.varied.items() if key not in ("type", "hook", "init_seed")},
    }
    if not is_complete(folder):
        failure = read_failure(folder) or {"error": "not finished", "step": 0}
        return {**row, "status": "failed", "error": failure["error"], "steps": failure["step"]}
    summary = read_summary(folder)
    measured = ("steps", "tokens", "rejected", "l0_train", "seconds", "tokens_per_second")
    numbers = {key: summary.get(key) for key in measured} | summary["eval"] | {"dead": summary["dead"]}
    return {**row, "status": "finished", **numbers, "notes": "; ".join(summary.get("notes", ())), "error": ""}


def read_failure(folder: Path) -> dict[str, Any] | None:
    """What stopped a member of a sweep: error, step, final; None if nothing did, or the note of it is damaged."""
    try:
        failure = RunFields.of_file(folder / FAILURE, "")
        return {"error": failure.get("error", str), "step": failure.integer("step"), "final": failure.body.get("final")}
    except NotARunError:
        return None


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """results.csv, results.md, results.json and pareto.png."""
    files.write_text(folder / CSV_FILE, csv_table(rows))
    files.write_text(folder / MARKDOWN_FILE, markdown_table(rows))
    files.write_json(folder / JSON_FILE, {"rows": [dict(row) for row in rows]})
    from sae_granary.train.result.plots import pareto  # matplotlib

    pareto(rows, folder / PLOT_FILE)


def csv_table(rows: Sequence[Row]) -> str:
    """Every column that any row has."""
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dict(row) for row in rows)
    return out.getvalue()


def markdown_table(rows: Sequence[Row]) -> str:
    """The columns that people read."""
    columns = [*MARKDOWN_COLUMNS, *(name for name in DOWNSTREAM_COLUMNS if any(name in row for row in rows))]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row, column) for column in columns) + " |" for row in rows]
    for note in dict.fromkeys(str(row["notes"]) for row in rows if row.get("notes")):
        names = [str(row["name"]) for row in rows if row.get("notes") == note]
        lines += ["", f"{'all' if len(names) == len(rows) else ', '.join(names)}: {note}"]
    return "\n".join(lines) + "\n"


def _cell(row: Row, column: str) -> str:
    value = row.get(column)
    if row["status"] != "finished" and column == "l0":
        return str(row["error"]).replace("|", "\\|")
    if value is None:
        return "n/a" if column in (*DOWNSTREAM_COLUMNS, "fvu") and column in row else ""
    formats = {
        "ce_score": "{:.4f}",
        "kl": "{:.4f}",
        "l0": "{:.1f}",
        "fvu": "{:.4f}",
        "dead": "{:.1%}",
        "seconds": "{:.0f}",
        "tokens": "{:,}",
    }
    return formats.get(column, "{}").format(value)


def _plain(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value
