"""Plots of a report as files, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sae_granary.analyze.report.run_facts import CURVES

MARKERS = "osD^v<>Pp*Xh"
SIZE = (5.5, 3.6)  # inches
MAX_NAMED = 12  # series in a legend

Draw = Callable[[Any], None]


def save_plots(facts: Mapping[str, Any], folder: Path, extension: str) -> list[Path]:
    """Write every plot of a page (see `report.report_run`) into a folder as "png" or "svg"; return the files."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with pyplot.rc_context({"svg.hashsalt": "sae-granary", "axes.grid": True, "grid.alpha": 0.3}):
        for name, draw in plots_of(facts):
            figure, panel = pyplot.subplots(figsize=SIZE, layout="constrained")
            draw(panel)
            written.append(folder / f"{name}.{extension}")
            metadata = {"Date": None} if extension == "svg" else {"Software": None}
            figure.savefig(written[-1], dpi=150, metadata=metadata)
            pyplot.close(figure)
    return written


def plots_of(facts: Mapping[str, Any]) -> Iterator[tuple[str, Draw]]:
    """Name of the file, and a function that draws the plot into axes."""
    runs: Sequence[Mapping[str, Any]] = facts["runs"]
    if points := [run for run in runs if run["l0"] is not None and run["fvu"] is not None]:
        yield "pareto", partial(_pareto, runs=points)
    for key, title in CURVES.items():
        if drawn := [run for run in runs if key in run["curves"]]:
            yield key, partial(_curves, key=key, title=title, runs=drawn)
    for run in runs[:1] if len(runs) == 1 else []:
        for key, title in (("density", "density of latents"), ("thresholds", "threshold")):
            if (run.get(key) or {}).get("edges"):
                yield key, partial(_histogram, values=run[key], title=title)
        if run.get("routing"):
            yield "routing", partial(_shares, shares=run["routing"])


def _pareto(panel: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    for i, name in enumerate(dict.fromkeys(str(run["type"]) for run in runs)):
        points = sorted((run["l0"], run["fvu"]) for run in runs if str(run["type"]) == name)
        panel.plot(*zip(*points, strict=True), MARKERS[i % len(MARKERS)] + "-", color=f"C{i % 10}", label=_plain(name))
    panel.set(xlabel="L0 (latents per row)", ylabel="FVU (lower is better)")
    panel.legend()


def _curves(panel: Any, key: str, title: str, runs: Sequence[Mapping[str, Any]]) -> None:
    for run in runs:
        panel.plot(*run["curves"][key], lw=1.2, label=_plain(run["name"]))
    panel.set(xlabel="step", ylabel=title)
    if 1 < len(runs) <= MAX_NAMED:
        panel.legend(fontsize=8)


def _histogram(panel: Any, values: Mapping[str, Any], title: str) -> None:
    panel.stairs(values["counts"], [10**edge for edge in values["edges"]], fill=True, alpha=0.8)
    panel.set(xscale="log", xlabel=title, ylabel="latents")


def _shares(panel: Any, shares: Mapping[str, float]) -> None:
    panel.bar(list(shares), list(shares.values()))
    panel.set(ylabel="share of the rows")


def _plain(name: str) -> str:
    """A name for matplotlib, in which `$` starts a formula and a leading `_` hides a label."""
    return " " * name.startswith("_") + name.replace("$", r"\$")
