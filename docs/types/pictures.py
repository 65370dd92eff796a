"""Draw the pictures of docs/types/index.md: `python docs/types/pictures.py`.

What is kept is computed by the SAEs themselves, on small inputs whose pre-activations equal the input. The pictures
have no background and gray text, so that they read on light and on dark pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

mpl.use("Agg")
from matplotlib import pyplot as plt

from sae_granary import sae_core

HERE = Path(__file__).resolve().parent
GRAY, TEAL, ORANGE = "#808488", "#1f9e96", "#e07a3f"
STYLE = {
    "text.color": GRAY, "axes.edgecolor": GRAY, "axes.labelcolor": GRAY, "xtick.color": GRAY, "ytick.color": GRAY,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "font.family": "sans-serif",
    "svg.fonttype": "none", "svg.hashsalt": "granary", "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
N, F = 4, 8


def small_sae(name: str, **options: Any) -> Any:
    """An SAE of F latents in F dimensions whose pre-activations equal its input."""
    cls = sae_core.registry.get(name)
    sae = cls(sae_core.make_config(cls, {"d_in": F, "d_sae": F, "normalize": "none", "loss": "mse", **options}))
    with torch.no_grad():
        for parameter, value in ((sae.W_enc, torch.eye(F)), (sae.W_dec, torch.eye(F))):
            parameter.copy_(value)
        sae.b_enc.zero_() if hasattr(sae, "b_enc") else None
        sae.b_dec.zero_()
    return sae.train()


def pre_activations() -> torch.Tensor:
    """(N, F) the same for all panels: two rows with strong latents, one with weak ones, one between."""
    p = torch.randn(N, F, generator=torch.Generator().manual_seed(3))
    return (p * torch.tensor([[1.4], [0.7], [1.3], [0.5]])).round(decimals=1) + 0.0  # no -0.0


def selection() -> None:
    """Which entries of the same pre-activations each type keeps."""
    p = pre_activations()
    thresholds = torch.tensor([0.3, 0.9, 0.5, 1.2, 0.2, 0.6, 0.9, 0.4])
    jumprelu = small_sae("jumprelu", recipe="tanh", l0_target=2, threshold_init=0.5)
    with torch.no_grad():
        jumprelu.threshold.copy_(thresholds)
    panels = {
        "vanilla: all positive": small_sae("vanilla"),
        "topk: 2 per row": small_sae("topk", k=2),
        "abstopk: 2 per row, by size": small_sae("abstopk", k=2),
        "batchtopk: 8 of the batch": small_sae("batchtopk", k=2),
        "jumprelu: above each latent's threshold": jumprelu.eval(),
    }
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 4.3), layout="constrained")
    for axis, (title, sae) in zip(axes.flat, panels.items(), strict=False):
        with torch.no_grad():
            kept = sae(p).codes.dense()
        grid(axis, p, kept != 0, title)
        if title.startswith("jumprelu"):
            for j, threshold in enumerate(thresholds.tolist()):
                axis.text(j + 0.5, N + 0.45, f"{threshold:g}", ha="center", va="center", fontsize=8, color=ORANGE)
    axes.flat[-1].axis("off")
    axes.flat[-1].text(
        0.02, 0.55, "rows: 4 tokens\ncolumns: 8 latents\nnumbers: pre-activations\nteal: kept\norange: thresholds",
        va="center", transform=axes.flat[-1].transAxes,
    )  # fmt: skip
    save(figure, "selection")


def grid(axis: Any, p: torch.Tensor, kept: torch.Tensor, title: str) -> None:
    """One panel: a cell per row and latent."""
    for i in range(N):
        for j in range(F):
            on = bool(kept[i, j])
            axis.add_patch(Rectangle((j, i), 0.94, 0.9, facecolor=TEAL if on else "none", edgecolor=GRAY, lw=0.6))
            color = "white" if on else GRAY
            axis.text(j + 0.47, i + 0.47, f"{p[i, j]:.1f}", ha="center", va="center", fontsize=8, color=color)
    axis.set(xlim=(-0.1, F), ylim=(N + 0.8, -0.1))
    axis.axis("off")
    axis.set_title(title, fontsize=11, color=GRAY)


def activations() -> None:
    """Activation over pre-activation of one latent."""
    p = np.linspace(-3, 3, 601)
    curves = {
        "vanilla: ReLU": np.maximum(p, 0),
        "jumprelu: p above the threshold": np.where(p > 1, p, 0),
        "gated: a gate, and a magnitude": np.where(p > 1, np.maximum(np.exp(0.3) * p - 0.8, 0), 0),
        "abstopk: p, if among the largest": np.where(np.abs(p) > 1, p, 0),
    }
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained", sharex=True, sharey=True)
    for axis, (title, z) in zip(axes, curves.items(), strict=True):
        axis.plot(p, broken(z), color=TEAL, lw=2)
        axis.axhline(0, color=GRAY, lw=0.5)
        axis.set_title(title, fontsize=10, color=GRAY)
        axis.set_xlabel("pre-activation p")
    axes[0].set_ylabel("activation z")
    save(figure, "activations")


def broken(z: np.ndarray) -> np.ndarray:
    """The curve with a gap where it jumps."""
    return np.where(np.append(np.abs(np.diff(z)) > 0.2, False), np.nan, z)


def matching_pursuit() -> None:
    """What is left of rows after each greedy step, and which share of it each step takes."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(64, 16, generator=generator), dim=1)
    weights = torch.rand(256, 64, generator=generator) * (torch.rand(256, 64, generator=generator) < 0.08)
    x, errors = weights @ directions, [1.0]
    cls = sae_core.registry.get("matching_pursuit")
    for k in range(1, 9):
        options = {"d_in": 16, "d_sae": 64, "normalize": "none", "loss": "mse", "k": k}
        sae = cls(sae_core.make_config(cls, options)).eval()
        with torch.no_grad():
            sae.W_dec.copy_(directions)
            sae.b_dec.zero_()
            errors.append(float((x - sae(x).x_hat).square().sum() / x.square().sum()))
    figure, axis = plt.subplots(figsize=(10.5, 2.4), layout="constrained")
    axis.bar(range(9), errors, color=TEAL, width=0.6)
    for k, error in enumerate(errors):
        axis.text(k, error + 0.02, f"{error:.2f}", ha="center", fontsize=9)
    axis.set(xlabel="greedy steps, one active latent more in each", ylabel="|x|² left", xticks=range(9), ylim=(0, 1.15))
    save(figure, "matching_pursuit")


def prefixes() -> None:
    """Nested prefixes of matryoshka, and what temporal compares."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 2.7), layout="constrained", width_ratios=[1.2, 1])
    for i, end in enumerate((1 / 32, 3 / 32, 7 / 32, 15 / 32, 1)):
        left.add_patch(Rectangle((0, 4 - i), end, 0.7, facecolor=TEAL, alpha=0.9 - 0.15 * i, edgecolor="none"))
        left.text(end + 0.01, 4.35 - i, f"{round(32 * end)}/32" if i < 4 else "all", va="center", fontsize=9)
    left.set(xlim=(0, 1.1), ylim=(-0.3, 5), title="matryoshka: every prefix reconstructs the row", yticks=[])
    left.set_xlabel("latents 0 .. d_sae")
    for row in range(2):
        y = 1.3 - 1.1 * row
        right.add_patch(Rectangle((0, y), 0.2, 0.7, facecolor=TEAL, edgecolor="none"))
        right.add_patch(Rectangle((0.21, y), 0.79, 0.7, facecolor="none", edgecolor=GRAY))
        right.text(1.03, y + 0.35, ("token t - 1", "token t")[row], va="center", fontsize=10)
    right.add_patch(arrow((0.1, 1.28), (0.1, 0.93), ORANGE, style="<|-|>"))
    right.text(0.14, 1.1, "should agree", color=ORANGE, va="center", fontsize=10)
    right.set(xlim=(-0.02, 1.35), ylim=(-0.1, 2.2), title="temporal: high-level latents of neighbors")
    for axis in (left, right):
        axis.title.set_color(GRAY)
        axis.title.set_fontsize(11)
    left.spines["left"].set_visible(False)
    right.axis("off")
    save(figure, "prefixes")


def hook_points() -> None:
    """Types that read or write several hook points."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.2), layout="constrained")
    for axis, title in zip(axes, ("route", "crosscoder", "transcoder", "skip_transcoder"), strict=True):
        axis.set(xlim=(0, 10), ylim=(0, 10))
        axis.axis("off")
        axis.set_title(title, fontsize=12, color=GRAY)
    for axis in axes[:2]:
        for i, y in enumerate((1.2, 4.2, 7.2)):
            box(axis, (0.2, y), f"x{'₂₃₄'[i]}")
    route, cross, trans, skip = axes
    for i, (y, weight) in enumerate(((1.2, "0.1"), (4.2, "0.7"), (7.2, "0.2"))):
        route.add_patch(arrow((2.2, y + 0.8), (4.2, 5), TEAL if i == 1 else GRAY))
        route.text(2.5, y + (0.2 if i == 0 else 1.7), weight, fontsize=9, color=TEAL if i == 1 else GRAY)
        cross.add_patch(arrow((2.2, y + 0.8), (4.2, 5), TEAL))
        cross.add_patch(arrow((6.2, 5), (8, y + 0.8), TEAL))
        box(cross, (8, y), f"x̂{'₂₃₄'[i]}")
    box(route, (4.2, 4.2), "code", TEAL)
    route.add_patch(arrow((6.2, 5), (8, 5), TEAL))
    box(route, (8, 4.2), "x̂₃")
    box(cross, (4.2, 4.2), "code", TEAL)
    for axis in (trans, skip):
        box(axis, (0.2, 4.2), "x in")
        box(axis, (4.2, 4.2), "code", TEAL)
        box(axis, (8, 4.2), "x̂ out")
        axis.add_patch(arrow((2.2, 5), (4.2, 5), TEAL))
        axis.add_patch(arrow((6.2, 5), (8, 5), TEAL))
    skip.add_patch(
        FancyArrowPatch(
            (1.2, 4.1), (9, 4.1), connectionstyle="arc3,rad=0.45", arrowstyle="-|>", color=ORANGE, mutation_scale=11
        )
    )
    skip.text(5.1, 1.1, "+ x W_skip", ha="center", color=ORANGE, fontsize=10)
    save(figure, "hook_points")


def box(axis: Any, at: tuple[float, float], text: str, color: str = GRAY) -> None:
    """A rounded box with a word in it."""
    axis.add_patch(
        FancyBboxPatch(at, 2, 1.6, boxstyle="round,pad=0,rounding_size=0.3", facecolor="none", edgecolor=color, lw=1.4)
    )
    axis.text(at[0] + 1, at[1] + 0.75, text, ha="center", va="center", color=color, fontsize=10)


def arrow(start: tuple[float, float], end: tuple[float, float], color: str, style: str = "-|>") -> FancyArrowPatch:
    """An arrow."""
    return FancyArrowPatch(start, end, arrowstyle=style, color=color, mutation_scale=10, lw=1.3, shrinkA=0, shrinkB=0)


def save(figure: Any, name: str) -> None:
    """Write HERE/name.svg, the same bytes each time."""
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)


def main() -> None:
    """Draw all."""
    with mpl.rc_context(STYLE):
        for draw in (activations, selection, matching_pursuit, prefixes, hook_points):
            draw()


if __name__ == "__main__":
    main()
