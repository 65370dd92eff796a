"""Plots. matplotlib is imported here and nowhere else, without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARKERS = "osD^v<>Pp*Xh"


def pareto(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """L0 against FVU of finished SAEs, both in inference: one panel per hook point, one color per type."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    finished = [row for row in rows if row["status"] == "finished" and row.get("fvu") is not None]
    hooks = list(dict.fromkeys(str(row["hook"]) for row in finished)) or [""]
    types = list(dict.fromkeys(str(row["type"]) for row in finished))
    figure, axes = pyplot.subplots(
        1, len(hooks), figsize=(5.5 * len(hooks), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, hook in zip(axes[0], hooks, strict=True):
        for i, name in enumerate(types):
            points = sorted((r["l0"], r["fvu"]) for r in finished if (str(r["hook"]), str(r["type"])) == (hook, name))
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, y, MARKERS[i % len(MARKERS)] + "-", color=f"C{i % 10}", label=name, lw=1, alpha=0.8)
        panel.set(xlabel="L0 (latents per row)", title=hook)
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("FVU (lower is better)")
    if types:
        axes[0][0].legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
