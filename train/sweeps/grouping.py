"""Grouping the SAEs of a sweep that train together: those of one stream of batches, as many as fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sae_granary.cache.read.recorded import PATHS, cache_paths
from sae_granary.common.errors import ConfigError
from sae_granary.common.quantities import byte_size
from sae_granary.train.config.phases import needs_language_model
from sae_granary.train.data.run_data import RunData
from sae_granary.train.memory.capacity import available_memory, held_by_others, stream_bytes
from sae_granary.train.memory.footprint import MARGIN, Footprint, estimate, fit_groups, measure
from sae_granary.train.sweeps.sweep_plan import Entry, Group


def groups_of(members: Sequence[tuple[RunData, Entry]], *, batched: bool = False) -> tuple[list[Group], list[str]]:
    """One group per stream, or several where the memory does not hold all of its SAEs; `batched`: with their steps."""
    by_stream: dict[Any, list[tuple[RunData, Entry]]] = {}
    for data, entry in members:
        by_stream.setdefault(data.stream_key, []).append((data, entry))
    groups, notes = [], []
    for stream in by_stream.values():
        fitting, note = _fit(stream, batched=batched)
        notes += note
        for part in fitting:
            first = part[0][0]
            record = {"counts": first.counts.to_json(), **asdict(first.identity)}
            record[PATHS] = cache_paths(first.cache.path, Path(first.config.runs_dir))
            groups.append(Group(tuple(entry for _, entry in part), record))
    if len(by_stream) > 1:
        notes.append(f"{len(by_stream)} streams of batches: seeds of the order, filters or batch sizes differ")
    return groups, notes


def _fit(stream: list[tuple[RunData, Entry]], *, batched: bool) -> tuple[list[list[tuple[RunData, Entry]]], list[str]]:
    device = stream[0][0].config.device
    there = available_memory(device)
    if there is None:
        return [stream], []
    usable = int(MARGIN * there) - stream_bytes([data for data, _ in stream])
    sizes = [estimate(data.config) for data, _ in stream]
    known: dict[str, Footprint] = {}
    if 2 * (sum(s.resident for s in sizes) + max(s.step for s in sizes)) > usable:
        sizes = [
            size if size.total > usable else _measured(data, known)
            for (data, _), size in zip(stream, sizes, strict=True)
        ]
    if batched:  # all have gradients at a time
        sizes = [Footprint(size.total, 0) for size in sizes]
    alone = [size.total <= usable for size in sizes]
    if not all(alone):
        entry, size = next((e, s) for (_, e), s, fits in zip(stream, sizes, alone, strict=True) if not fits)
        raise ConfigError(
            f"{sum(alone)} of these {len(stream)} SAEs would fit: {entry.name} needs {byte_size(size.total)} of "
            f"memory, {device} has {byte_size(max(usable, 0))} to give{held_by_others(device)}; "
            "lower d_sae or batch_size, or raise --grad-acc-steps"
        )
    groups = fit_groups([(member, size) for member, size in zip(stream, sizes, strict=True)], usable)
    if len(groups) == 1:
        return groups, []
    needed = sum(s.resident for s in sizes) + max(s.step for s in sizes)
    note = (
        f"{len(stream)} SAEs need {byte_size(needed)} of memory, {device} has {byte_size(usable)} to give: "
        f"{max(map(len, groups))} fit at once, {len(groups)} groups train one after another"
    )
    return groups, [note]


def _measured(data: RunData, known: dict[str, Footprint]) -> Footprint:
    """A measured footprint; runs of equal sizes are measured once."""
    config = data.config
    sizes = {**config.options, "lr": None, "dead_after_tokens": None}
    step = (config.batch_size, config.grad_acc_steps, config.optimizer, config.compute_dtype)
    key = repr((config.type, step, sizes))
    if key not in known:
        # A step through the language model wants windows of text: `capacity` counts what it needs.
        known[key] = (None if needs_language_model(config) else measure(data)) or estimate(config)
    return known[key]
