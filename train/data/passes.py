"""Rows that a run reads besides its training batches: a sample to start from, calibration, evaluation, resampling.

Every pass leaves out rows that are not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sae_granary.cache.load.loader import Loader, LoaderState
from sae_granary.cache.load.selection import Part
from sae_granary.sae_core import Rows
from sae_granary.train.config.resolve import selection_of, shuffle_of
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.streams import open_stream

SAMPLE_ELEMENTS = 2**26  # numbers in the sample that normalization and b_dec are fitted to
MAX_SAMPLE_ROWS = 2**20
CALIBRATION_ROWS = 2**17


def sample(data: RunData) -> Rows:
    """The first rows of the run's order, on the CPU: at most 2**20 rows, and at most 2**26 numbers of 1024 or more."""
    d_in = data.config.options["d_in"] * len(data.config.hook)
    n_rows = min(MAX_SAMPLE_ROWS, max(SAMPLE_ELEMENTS // d_in, 1024))
    with _loader(data, "train", batch_size=data.config.batch_size, device="cpu") as loader:
        parts = [batch.x for batch in _take_rows(loader, n_rows)]
    return finite_rows({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def calibration(data: RunData) -> Iterator[Rows]:
    """Training rows for `SAE.calibrate`, in micro-batches."""
    yield from _pass(data, "train", CALIBRATION_ROWS)


def evaluation(data: RunData) -> Iterator[Rows]:
    """At most `eval_rows` rows of the part that is evaluated, in micro-batches."""
    yield from _pass(data, data.eval_part, data.config.eval_rows)


def validation(data: RunData) -> Iterator[Rows]:
    """The first `val_rows` rows of the final evaluation, in micro-batches."""
    yield from _pass(data, data.eval_part, min(data.config.val_rows, data.config.eval_rows))


def upcoming(data: RunData, state: LoaderState, n_rows: int) -> Iterator[Rows]:
    """Training rows from a loader state on, in batches; the stream that the run trains on does not move."""
    with open_stream([data], state) as loader:
        for batch in _take_rows(loader, n_rows):
            yield finite_rows(data.inputs(batch.x))


def finite_rows(x: Rows) -> Rows:
    """The rows that are finite at every hook point."""
    finite = torch.stack([torch.isfinite(t).all(1) for t in x.values()]).all(0)
    return x if bool(finite.all()) else {hook: t[finite] for hook, t in x.items()}


def _pass(data: RunData, part: Part, n_rows: int) -> Iterator[Rows]:
    size = data.config.batch_size // data.config.grad_acc_steps
    with _loader(data, part, batch_size=size, device=data.config.device) as loader:
        for batch in _take_rows(loader, n_rows):
            yield finite_rows(batch.x)


def _take_rows(loader: Loader, n_rows: int) -> Iterator[Any]:
    """Whole batches until n_rows are reached, at least one of them unless n_rows is 0."""
    taken = 0
    while taken < n_rows and (batch := next(loader, None)) is not None:
        taken += batch.n_rows
        yield batch


def _loader(data: RunData, part: Part, *, batch_size: int, device: str) -> Loader:
    """One pass over a part of the run's own rows, in the run's order."""
    config = data.config
    return Loader(
        data.cache,
        config.hook,
        batch_size=batch_size,
        order=shuffle_of(config),
        device=device,
        selection=selection_of(config, part),
        epochs=1,
        previous=data.reads_previous,
        counts=data.counts,
    )
