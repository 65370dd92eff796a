"""Memory of a run: estimated from its sizes, or measured by taking a few steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from sae_granary.train import loop
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.run_data import RunData
from sae_granary.train.memory.capacity import (
    FLOAT_BYTES,
    available_memory,
    needed_memory,
    parameter_bytes,
    pre_act_entries,
)
from sae_granary.train.state.rng import Rng
from sae_granary.train.state.run_state import Run, build_sae
from sae_granary.train.step_input import RowInput

PROBE_STEPS = 2  # the first one also makes the optimizer's state
MARGIN = 0.9  # share of the free memory that is used
_STATUS, _PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")

T = TypeVar("T")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one run."""

    resident: int  # weights, optimizer, buffers: as long as the run lasts
    step: int  # gradients and activations while a step is taken: one run of a process at a time

    @property
    def total(self) -> int:
        """Bytes of a run that trains alone."""
        return self.resident + self.step


def estimate(config: TrainConfig) -> Footprint:
    """From the sizes of parameters, optimizer and pre-activations."""
    total = needed_memory(config)
    pre_acts = FLOAT_BYTES * pre_act_entries(config)
    step = parameter_bytes(config) + pre_acts  # gradients, pre-activations
    return Footprint(total - step, step + pre_acts)


def measure(data: RunData) -> Footprint | None:
    """Measure by taking steps of a temporary run on random rows; None if the system does not report memory."""
    before, config = used_memory(data.config.device, restart_peak=True), data.config
    if before is None:
        return None
    with Rng(config.device):
        run = Run.create(config, build_sae(config))
        rows = {
            name: torch.randn(config.batch_size, data.width(name), device=config.device) for name in data.input_names
        }
        try:
            for _ in range(PROBE_STEPS):
                loop.train_step(run, RowInput(rows))
        except torch.OutOfMemoryError:
            return Footprint(estimate(config).resident, available_memory(config.device) or 0)
        run.optimizer.zero_grad(set_to_none=True)
        after = used_memory(config.device)
    assert after is not None
    least = estimate(config)  # what was freed before may still be held for reuse, and is then not counted as growth
    resident = max(after.now - before.now, least.resident)
    return Footprint(resident, max(after.peak - before.now - resident, least.step))


@dataclass(frozen=True)
class Memory:
    """Memory of this process on a device."""

    now: int  # bytes in use
    peak: int  # most bytes in use since the last restart


def used_memory(device: str, *, restart_peak: bool = False) -> Memory | None:
    """Memory in use on a device; None if the system does not report it. `restart_peak` forgets earlier peaks."""
    if device.startswith("cuda"):
        if restart_peak:
            torch.cuda.reset_peak_memory_stats(device)
        return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    try:
        if restart_peak:
            _PEAK.write_text("5", encoding="ascii")  # see proc(5): resets VmHWM
        status = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    kib = {name: int(value) for name, value in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE)}
    return Memory(kib["VmRSS"] * 1024, kib["VmHWM"] * 1024) if len(kib) == 2 else None


def fit_groups(footprints: Sequence[tuple[T, Footprint]], available: int) -> list[list[T]]:
    """Split runs, in order, into groups that fit together. A run that does not fit by itself is a separate group."""
    groups: list[tuple[list[T], int, int]] = []
    for item, needed in footprints:
        for i, (members, resident, step) in enumerate(groups):
            if resident + needed.resident + max(step, needed.step) <= available:
                groups[i] = ([*members, item], resident + needed.resident, max(step, needed.step))
                break
        else:
            groups.append(([item], needed.resident, needed.step))
    return [members for members, _, _ in groups]
