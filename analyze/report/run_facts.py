"""Facts from the files of a run: metrics, settings, training curves. An SAE without a run has fewer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_granary.common.errors import one_line
from sae_granary.common.files import read_regular
from sae_granary.common.finished_run import (
    CONFIG,
    RECORD,
    SAE_RECORD,
    SUMMARY,
    NotARunError,
    read_metadata,
    read_metrics,
    read_summary,
)
from sae_granary.common.quantities import duration, quantity

CURVES = {"loss": "loss", "l0": "L0", "fvu": "FVU", "dead": "dead latents"}
N_POINTS = 500  # of a curve


def runs_in(folders: Sequence[Path]) -> list[Path]:
    """The runs that some folders name: of a sweep, or of a folder of runs, the finished runs in it.

    Raises NotARunError for a folder with neither.
    """
    found = []
    for folder in folders:
        if (folder / SAE_RECORD).is_file() or (folder / RECORD).is_file() or (folder / "cfg.json").is_file():
            found.append(folder)
            continue
        inside = sorted(path.parent for path in folder.glob(f"*/{SUMMARY}"))
        if not inside:
            raise NotARunError(f"{folder} holds no SAE and no finished runs: expected a run, a sweep, or runs in it")
        found += inside
    return list(dict.fromkeys(found))


def run_facts(folder: Path) -> dict[str, Any]:
    """A run as JSON: name, type, metrics of its summary, settings, curves, notes."""
    summary: Mapping[str, Any] = read_summary(folder) if (folder / SUMMARY).is_file() else {}
    metadata = read_metadata(folder)
    numbers = summary.get("eval", {})
    k = summary.get("k")
    hooks = summary.get("hook") or metadata.get("hook_points") or []
    return {
        "name": str(summary.get("name") or folder.resolve().name),
        "type": summary.get("type"),
        "hook": ", ".join(map(str, hooks)),
        "model": metadata.get("model_name"),
        "d_in": summary.get("d_in"),
        "d_sae": summary.get("d_sae"),
        "k": k,
        "l0": numbers.get("l0"),
        "l0_train": summary.get("l0_train"),
        "fvu": numbers.get("fvu"),
        "dead": summary.get("dead"),
        "rare": numbers.get("rare"),
        "ce_score": numbers.get("ce_score"),
        "kl": numbers.get("kl"),
        "rows": quantity(summary["tokens"]) if summary.get("tokens") else None,
        "time": duration(summary["seconds"]) if summary.get("seconds") else None,
        "part": {"heldout": "held-out rows"}.get(str(summary.get("eval_part")), "rows"),
        "n_eval_rows": numbers.get("n_rows"),
        "settings": settings_of(folder),
        "curves": curves_of(folder),
        "notes": [str(note) for note in summary.get("notes", ())],
    }


def curves_of(folder: Path) -> dict[str, list[list[float]]]:
    """Name of a curve -> [steps, values], at most 500 points of each; a diverged run has NaN, which is left out."""
    lines, curves = read_metrics(folder), {}
    for name in CURVES:
        points = [(line["step"], line[name]) for line in lines if _is_finite(line.get(name))]
        if points:
            points = points[:: -(len(points) // N_POINTS + 1)][::-1]  # the last one stays
            curves[name] = [list(column) for column in zip(*points, strict=True)]
    return curves


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def settings_of(folder: Path) -> list[list[Any]]:
    """[section, [[name, value], ...]] of config.yaml; empty where there is none, one line where it cannot be read."""
    import yaml

    path = folder / CONFIG
    if not path.is_file():
        return []
    try:
        content = yaml.safe_load(read_regular(path).decode())
        return [
            [str(section), [[str(name), "" if value is None else _plain(value)] for name, value in values.items()]]
            for section, values in content.items()
        ]
    except (OSError, ValueError, RecursionError, AttributeError, yaml.YAMLError) as error:
        return [[CONFIG, [["cannot be read", one_line(error)]]]]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
