"""The metrics of an SAE on every row of a part of a cache, summed in float64. docs/metrics.md defines them.

Shapes: N rows of a batch, D = d_out, F = d_sae.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_granary.analyze.encoding.encode import Tick, csr_of
from sae_granary.analyze.evaluation.groups import (
    POSITION_BINS,
    TOKEN_CLASSES,
    GroupedErrors,
    position_bin,
    token_classes,
)
from sae_granary.analyze.evaluation.rows import RunSettings, choose_rows, read_settings, trained_elsewhere
from sae_granary.analyze.evaluation.training_loss import TrainingLoss
from sae_granary.analyze.source import Source, damaged_row
from sae_granary.cache.load.loader import Batch, Loader
from sae_granary.cache.load.selection import Counts, Part, Selection
from sae_granary.common.device import float64
from sae_granary.common.finished_run import NotARunError, read_summary
from sae_granary.sae_core import Codes, Pattern, SAEOutput
from sae_granary.sae_core.metrics import Evaluator, decoder_max_cosine

BATCH_ROWS = 4096
FEW_ROWS = 2000  # on fewer a latent that fires seldom cannot be told from a silent one
DENSITY_EDGES = np.arange(-7, 0.01, 0.25)  # log10 of the firing rates in the histogram


def evaluate(source: Source, part: Part = "heldout", tick: Tick = lambda n_rows: None) -> dict[str, Any]:
    """Everything but what a language model tells; the fields are those of `evaluation.stored`, `downstream` None.

    The SAE sees float32 rows, sums are float64. Raises AnalyzeError where the part has no rows, CorruptCacheError for
    a damaged row, NotARunError for a run whose settings cannot be read.
    """
    settings = read_settings(source.folder)
    source.stage()
    selection, counts = choose_rows(source, part, settings)
    sums = _Sums(source, settings)
    for batch in _batches(source, selection, counts):
        sums.update(batch)
        tick(sums.metrics.n_rows)
    metrics = sums.result()
    return {
        "identity": source.identity,
        "name": source.folder.name,
        "type": source.sae.type_name,
        "d_in": source.sae.config.d_in,
        "d_sae": source.sae.config.d_sae,
        "cache": _short(source.cache.path),
        "hooks": list(source.hooks),
        "part": part,
        "selection": _described(selection),
        "rows": counts.to_json(),
        "n_rows": sums.metrics.n_rows,
        "dead_threshold": settings.dead_threshold,
        "metrics": {**metrics, "dead": _dead(source)},
        "losses": finite(sums.loss.result()) if sums.loss else None,
        "downstream": None,
        "routing": sums.routing(),
        "density_histogram": _density_histogram(sums.metrics),
        "by_position": sums.by_position.table() if sums.by_position else None,
        "by_token_class": sums.by_class.table() if sums.by_class else None,
        "notes": list(_notes(source, part, sums.metrics.n_rows, metrics)),
    }


def _described(selection: Selection) -> dict[str, Any]:
    """Filters and split as plain JSON values."""
    filters = {**asdict(selection.filters), "exclude_tokens": list(selection.filters.exclude_tokens)}
    return {"filters": filters, "holdout": asdict(selection.holdout)}


def _batches(source: Source, selection: Selection, counts: Counts) -> Iterator[Batch]:
    hooks, device = list(source.hooks), source.sae.core.W_dec.device
    options: dict[str, Any] = {"selection": selection, "counts": counts, "epochs": 1, "with_rows": True}
    with Loader(source.cache, hooks, batch_size=BATCH_ROWS, device=device, **options) as loader:
        yield from loader


class _Sums:
    """Sums over batches."""

    def __init__(self, source: Source, settings: RunSettings) -> None:
        sae, cache = source.sae, source.cache
        self.source, self.sae = source, sae
        self.metrics = Evaluator(sae.d_out, sae.config.d_sae, settings.dead_threshold)
        self.classes = token_classes(cache)
        self.by_class = GroupedErrors(TOKEN_CLASSES, sae.d_out) if self.classes else None
        self.by_position = GroupedErrors(POSITION_BINS, sae.d_out) if cache.unit == "token" else None
        self.l1 = self.largest = 0.0
        self.loss = TrainingLoss.of_run(source.folder, sae.core.W_dec.device)
        self.routed: Tensor | None = None  # rows that each hook point was chosen for, where a type chooses one

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Add a batch of rows with their ids."""
        assert isinstance(batch.x, Mapping)
        assert batch.row_ids is not None
        rows = self.source.cache.ordinals(batch.row_ids.numpy())
        self._check(batch.x, rows)
        out = self.sae(batch.x)
        codes = merged(out.codes)
        self.metrics.update(out.x, out.x_hat, codes)
        magnitudes = float64(codes.values).abs()
        self.l1 += float(magnitudes.sum())
        self.largest = max(self.largest, float(magnitudes.max()) if len(magnitudes) else 0.0)
        if (probabilities := out.extras.get("probabilities")) is not None:
            chosen = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]).cpu()
            self.routed = chosen if self.routed is None else self.routed + chosen
        if self.loss is not None:
            self.loss.update(batch.x)
        self._update_groups(out, codes, rows)

    def _check(self, x: Mapping[str, Tensor], rows: np.ndarray[Any, Any]) -> None:
        for hook, values in x.items():
            finite = torch.isfinite(values).all(1)
            if not bool(finite.all()):
                raise damaged_row(self.source.cache, hook, int(rows[int((~finite).nonzero()[0])]))

    def _update_groups(self, out: SAEOutput, codes: Codes, rows: np.ndarray[Any, Any]) -> None:
        if self.by_position is None:
            return
        x = float64(out.x).cpu()
        error = (x - float64(out.x_hat).cpu()).square().sum(1)
        n_active = codes.indptr.diff().double().cpu()
        column = self.source.cache.column
        self.by_position.update(position_bin(column("position")[rows]), x, error, n_active)
        if self.by_class is not None and self.classes is not None:
            told = (column(name)[rows] for name in ("token_id", "flags", "doc_position"))
            self.by_class.update(self.classes(*told), x, error, n_active)

    def result(self) -> dict[str, float | None]:
        """The metrics by name."""
        n_rows, n_active = self.metrics.n_rows, self.metrics.n_active
        numbers = {
            **self.metrics.result(),
            "l1": self.l1 / n_rows,
            "activation_mean": self.l1 / n_active if n_active else None,
            "activation_max": self.largest,
            "decoder_max_cosine": decoder_max_cosine(self.sae.core.W_dec),
        }
        return finite(numbers)

    def routing(self) -> dict[str, float] | None:
        """Share of rows for which each hook point was chosen; None for types that do not choose."""
        if self.routed is None:
            return None
        return dict(zip(self.source.hooks, (self.routed / self.metrics.n_rows).tolist(), strict=True))


def finite(numbers: Mapping[str, float | None]) -> dict[str, float | None]:
    """Replace NaN and Inf by None, as JSON requires."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in numbers.items()}


def merged(codes: Codes) -> Codes:
    """The codes with one entry per active latent of a row, and none that is zero."""
    if codes.pattern.is_full:
        return Codes.from_dense(codes.values)
    block = csr_of(codes)
    indptr = torch.from_numpy(np.concatenate([[0], np.cumsum(block["counts"])]))
    indices = torch.from_numpy(block["indices"]).long()
    return Codes(torch.from_numpy(block["values"]), Pattern(*codes.shape, indices, indptr))


def _dead(source: Source) -> float | None:
    """The share of dead latents that a run counted in training; None for an SAE without a finished run."""
    try:
        dead = read_summary(source.folder).get("dead")
    except NotARunError:
        return None
    return float(dead) if isinstance(dead, int | float) else None


def _density_histogram(metrics: Evaluator) -> dict[str, Any]:
    """Number of latents with a firing rate in each quarter of a decade; rates below 1e-7 count in the first."""
    rates = metrics.densities().cpu().numpy()
    logs = np.log10(rates[rates > 0]).clip(DENSITY_EDGES[0], 0)
    counts, _ = np.histogram(logs, DENSITY_EDGES)
    return {"log10_edges": DENSITY_EDGES.tolist(), "counts": counts.tolist(), "never_fired": int((rates == 0).sum())}


def _notes(source: Source, part: Part, n_rows: int, metrics: Mapping[str, float | None]) -> Iterator[str]:
    if metrics["mse"] is None:
        yield "the reconstruction of some rows is NaN or Inf: what is summed over them is not defined"
    elif metrics["fvu"] is None:
        yield f"FVU is not defined: the {n_rows:,} evaluated rows do not vary"
    elif n_rows < FEW_ROWS:
        yield f"evaluated on {n_rows:,} rows only, other rows may differ: harvest more text, or give --part all"
    if trained_elsewhere(source):
        yield f"trained on another cache than {_short(source.cache.path)}"
    elif part != "heldout":
        yield "training rows are among the evaluated ones" if part == "all" else "evaluated on training rows"


def _short(path: Path) -> str:
    """A path without `..`, relative to the working directory if it is inside."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
