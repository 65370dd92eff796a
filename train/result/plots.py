"""Plots of runs. matplotlib is imported here and nowhere else in train, without a display."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_granary.common.errors import ConfigError

MARKERS = "osD^v<>Pp*Xh"
STYLES = ("-", "--", ":", "-.")  # of curves: one for each round of ten colors
LABELS = ("target", "k", "l0_target", "l1_coef", "l0_coef")  # of a point: the first that its row has
MANY_CURVES = 8  # of more the legend stands beside the plot


def pareto(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """L0 against FVU of finished SAEs, both in inference: a panel per hook point and cache, a color per type and width.

    Rows are those of `sweeps.results` or `result.comparison`. Each point is labeled with what its SAE was asked for.
    """
    finished = [row for row in rows if row["status"] == "finished" and row.get("fvu") is not None]
    caches = {row.get("cache") for row in finished}
    panels = list(dict.fromkeys(_panel(row, caches) for row in finished)) or [""]
    widths = {row.get("d_sae") for row in finished}
    series = list(dict.fromkeys(_series(row, widths) for row in finished))
    with _figure(path, len(panels), sharey=True) as axes:
        for panel, title in zip(axes, panels, strict=True):
            for i, name in enumerate(series):
                chosen = [row for row in finished if (_panel(row, caches), _series(row, widths)) == (title, name)]
                _points(panel, sorted(chosen, key=lambda row: (row["l0"], row["fvu"])), name, i)
            panel.set(xlabel="L0 (latents per row)", title=_plain(title))
            panel.grid(alpha=0.3)
            panel.margins(0.2, 0.1)  # room for the labels
            if panel.lines:
                panel.legend(fontsize=8)
        axes[0].set_ylabel("FVU (lower is better)")


def _panel(row: Mapping[str, Any], caches: set[Any]) -> str:
    """Title of the panel for a row."""
    return f"{row['hook']}\n{row['cache']}" if len(caches) > 1 else str(row["hook"])


def _series(row: Mapping[str, Any], widths: set[Any]) -> str:
    """Name of the line for a row: its type, and its width where widths differ."""
    return f"{row['type']}, {row['d_sae']:,} latents" if len(widths) > 1 else str(row["type"])


def _plain(text: str) -> str:
    """Text with no part interpreted as a formula."""
    return text.replace("$", r"\$")


def _points(panel: Any, rows: Sequence[Mapping[str, Any]], name: str, i: int) -> None:
    """The points of one line."""
    if not rows:
        return
    x, y = [row["l0"] for row in rows], [row["fvu"] for row in rows]
    panel.plot(x, y, MARKERS[i % len(MARKERS)] + "-", color=f"C{i % 10}", label=_plain(name), lw=1, alpha=0.8)
    above = i % 2 == 0  # labels of two lines at one point do not cover each other
    for row in rows:
        panel.annotate(
            _plain(_label(row)),
            (row["l0"], row["fvu"]),
            (4, 4) if above else (-4, -4),
            textcoords="offset points",
            ha="left" if above else "right",
            va="bottom" if above else "top",
            fontsize=7,
            color=f"C{i % 10}",
        )


def _label(row: Mapping[str, Any]) -> str:
    key = next((key for key in LABELS if row.get(key) not in (None, "")), None)
    if key is None:
        return ""
    return str(row[key]) if key == "target" else f"{key}={row[key]}"


def curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Loss and FVU of training batches over the rows trained on, a curve per run; `runs`: name -> metrics lines."""
    names = (("loss", "loss (in the units of each type)"), ("fvu", "FVU of training batches"))
    with _figure(path, len(names), legend_width=0.0 if len(runs) <= MANY_CURVES else 3.5) as axes:
        for panel, (name, label) in zip(axes, names, strict=True):
            for i, (run, lines) in enumerate(runs.items()):
                points = [(line["tokens"], line[name]) for line in lines if _is_number(line.get(name))]
                x, y = zip(*points, strict=True) if points else ((), ())
                panel.plot(x, y, STYLES[i // 10 % len(STYLES)], color=f"C{i % 10}", label=_plain(run), lw=1.2)
            panel.set(xlabel="rows trained on", ylabel=label, yscale="log")
            panel.grid(alpha=0.3, which="both")
        if len(runs) <= MANY_CURVES:
            axes[0].legend(fontsize=8)
        else:
            axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))


def _is_number(value: Any) -> bool:
    """Whether a logarithmic axis can show a value."""
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


@contextmanager
def _figure(path: Path, n_panels: int, *, sharey: bool = False, legend_width: float = 0.0) -> Any:
    """Yield the axes of a row of panels, written to the path at the end. Raises ConfigError for a bad path."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    size = (5.5 * n_panels + legend_width, 4.2)
    figure, axes = pyplot.subplots(1, n_panels, figsize=size, sharey=sharey, squeeze=False, layout="constrained")
    try:
        kinds = figure.canvas.get_supported_filetypes()
        if path.suffix.removeprefix(".").lower() not in kinds:
            got = path.suffix or "no ending"
            raise ConfigError(f"{path}: a plot cannot be written with {got}; give the file .png, .svg or .pdf")
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}; create it, or name another file")
        yield list(axes[0])
        figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix == ".png" else None)
    finally:
        pyplot.close(figure)
