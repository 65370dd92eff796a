"""Rows that a run reads besides its training batches: the initial sample, calibration, evaluation, resampling.

Every pass skips damaged rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sae_granary.cache.errors import CorruptCacheError
from sae_granary.cache.load.loader import WHOLE, Batch, Loader, LoaderState
from sae_granary.cache.load.selection import Part
from sae_granary.common.device import float64
from sae_granary.sae_core import Rows
from sae_granary.train.config.resolve import selection_of, shuffle_of
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.streams import open_stream

SAMPLE_ELEMENTS = 2**26  # numbers in the sample that normalization and b_dec are fitted to
MAX_SAMPLE_ROWS = 2**20
CALIBRATION_ROWS = 2**17
NORM_ERROR = 1e-4  # relative, of the norm of a row and the stored one


def sample(data: RunData) -> Rows:
    """The first rows of the run's order, on the CPU: at most 2**20 rows, and at most 2**26 numbers of 1024 or more."""
    d_in = data.config.options["d_in"] * len(data.config.hook)
    n_rows = min(MAX_SAMPLE_ROWS, max(SAMPLE_ELEMENTS // d_in, 1024))
    with _loader(data, "train", batch_size=data.config.batch_size, device="cpu") as loader:
        parts = [sound_rows(data, batch) for batch in _take_rows(loader, n_rows)]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not len(rows[data.config.hook[0]]):
        raise CorruptCacheError(f"{data.cache.path}: no row can be trained on; find the damage with `sae-cache verify`")
    return rows


def calibration(data: RunData) -> Iterator[Rows]:
    """Training rows for `SAE.calibrate`, in micro-batches."""
    yield from _pass(data, "train", CALIBRATION_ROWS)


def evaluation(data: RunData, dropped: Callable[[int], None] = lambda n: None) -> Iterator[Rows]:
    """At most `eval_rows` rows of the evaluated part, in micro-batches; `dropped` gets the number of damaged ones."""
    yield from _pass(data, data.eval_part, data.config.eval_rows, dropped)


def validation(data: RunData) -> Iterator[Rows]:
    """The first `val_rows` rows of the final evaluation, in micro-batches."""
    yield from _pass(data, data.eval_part, min(data.config.val_rows, data.config.eval_rows))


def upcoming(data: RunData, state: LoaderState, n_rows: int) -> Iterator[Rows]:
    """Training rows from a loader state on, in batches; the training stream itself does not advance."""
    with open_stream([replace(data, share=WHOLE)], state) as loader:
        for batch in _take_rows(loader, n_rows):
            yield sound_rows(data, batch)


def sound_rows(data: RunData, batch: Batch) -> Rows:
    """The rows of a batch that are as they were harvested, as far as that shows, under the names that the run reads.

    Left out are those with a NaN, an Inf or a value larger than any that was harvested, and, where the batch says which
    rows it holds, those that do not have their stored norm.
    """
    assert isinstance(batch.x, dict)
    x = data.inputs(batch.x)
    sound = torch.stack([(t.abs() <= data.limits[name]).all(1) for name, t in x.items()])
    if batch.row_ids is not None:
        sound = torch.cat([sound, torch.stack([_has_its_norm(data, name, batch) for name in data.config.hook])])
    kept = sound.all(0)
    return x if bool(kept.all()) else {name: t[kept] for name, t in x.items()}


def _has_its_norm(data: RunData, hook: str, batch: Batch) -> Tensor:
    assert isinstance(batch.x, dict)
    assert batch.row_ids is not None
    rows: Tensor = batch.x[hook]
    stored = torch.from_numpy(data.cache.norms(hook)[data.cache.ordinals(batch.row_ids.numpy())])
    norms = float64(rows).norm(dim=1)  # in float32 the squares of small values vanish
    fits: Tensor = (norms - stored.to(norms)).abs() <= NORM_ERROR * stored.to(norms)
    return fits.to(rows.device)


def _pass(data: RunData, part: Part, n_rows: int, dropped: Callable[[int], None] = lambda n: None) -> Iterator[Rows]:
    size = data.config.batch_size // data.config.grad_acc_steps
    with _loader(data, part, batch_size=size, device=data.config.device) as loader:
        for batch in _take_rows(loader, n_rows):
            rows = sound_rows(data, batch)
            dropped(batch.n_rows - len(rows[data.config.hook[0]]))
            yield rows


def _take_rows(loader: Loader, n_rows: int) -> Iterator[Batch]:
    """Whole batches until n_rows are reached; at least one unless n_rows is 0."""
    taken = 0
    while taken < n_rows and (batch := next(loader, None)) is not None:
        taken += batch.n_rows
        yield batch


def _loader(data: RunData, part: Part, *, batch_size: int, device: str) -> Loader:
    """One pass over a part of the run's rows, in the run's order."""
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
        with_rows=True,
    )
