"""Out of memory in mid-run: the same step again, in smaller micro-batches."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from sae_granary.common.quantities import byte_size
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.errors import MemoryLimitError
from sae_granary.train.memory.capacity import available_memory, held_by_others, needed_memory
from sae_granary.train.state.run_state import Run


def shrink(run: Run) -> str:
    """Set micro-batches of half the rows, and the run back to before its step; return a line about it.

    The line is also noted in the run. Raises MemoryLimitError if a micro-batch is one row already.
    """
    config = run.config
    run.optimizer.zero_grad(set_to_none=True)
    run.rng.restore()
    free_memory(config.device)
    wanted = range(2 * config.grad_acc_steps, config.batch_size + 1)
    n_parts = next((n for n in wanted if config.batch_size % n == 0), None)
    if n_parts is None:
        raise MemoryLimitError(f"{out_of_memory(config)}, even with micro-batches of {rows_at_once(config):,} rows")
    run.config = replace(config, grad_acc_steps=n_parts)
    others = held_by_others(config.device)
    line = (
        f"out of memory in step {run.step + 1} with {rows_at_once(config):,} rows at once{others}: "
        f"from here on in micro-batches of {rows_at_once(run.config):,} (grad_acc_steps={n_parts})"
    )
    if run.sae.core.selects_in_batch:
        line += f", over each of which {config.type} selects: the result differs from that of whole batches"
    run.notes.append(line)
    return line


def rows_at_once(config: TrainConfig) -> int:
    """Rows of a micro-batch."""
    return config.batch_size // config.grad_acc_steps


def free_memory(device: str) -> None:
    """Return what no tensor uses any more to the device."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def out_of_memory(config: TrainConfig) -> str:
    """What a run needs of a device's memory, and what there is."""
    there = available_memory(config.device)
    free = "" if there is None else f", {byte_size(there)} are free{held_by_others(config.device)}"
    return f"out of memory on {config.device}: the run needs about {byte_size(needed_memory(config))}{free}"


@contextmanager
def out_of_memory_is_clear(config: TrainConfig, folder: Path) -> Iterator[None]:
    """Raise MemoryLimitError for an out-of-memory inside the block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryLimitError(
            f"{out_of_memory(config)}; free memory, then run: sae-train resume {folder}; or train with a smaller "
            "--d-sae, or more --grad-acc-steps"
        ) from None
