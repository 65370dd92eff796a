"""Memory and disk that a run needs, checked before anything is allocated."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from sae_granary.common.errors import ConfigError
from sae_granary.common.files import free_bytes
from sae_granary.common.quantities import byte_size
from sae_granary.sae_core.kernels.gpu_screen import CHUNK_ENTRIES
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.data.run_data import RunData
from sae_granary.train.optim.optimizers import OPTIMIZERS
from sae_granary.train.state.run_state import build_sae

FLOAT_BYTES = 4
CONTEXT_BYTES = 2**30  # of this process beside its tensors: CUDA's context and its libraries
LOGIT_COPIES = 6  # clean and spliced, their log-probabilities, gradients


def check_capacity(data: RunData) -> None:
    """Refuse a run that cannot fit. Raises ConfigError with what is needed and what is available."""
    config = data.config
    memory, disk = needed_memory(config) // data.shards.n, needed_disk(config)
    there = available_memory(config.device)
    rows = stream_bytes([data])
    if there is not None and memory + rows > there:
        fits = _what_fits(config, (there - rows) * data.shards.n)
        raise ConfigError(
            f"d_sae={config.options['d_sae']:,} with batch_size={config.batch_size:,} needs about "
            f"{byte_size(memory + rows)} of memory, {config.device} has {byte_size(there)}"
            f"{held_by_others(config.device)}: {fits}; or raise --grad-acc-steps"
        )
    free = free_bytes(Path(config.runs_dir))
    if disk > free:
        raise ConfigError(
            f"{config.runs_dir} has {byte_size(free)} free, the run's checkpoints need about {byte_size(disk)}: "
            "free space, lower --keep, or choose another --runs-dir"
        )


def _what_fits(config: TrainConfig, there: int) -> str:
    d_sae = int(config.options["d_sae"])
    fits = int(max(there, 0) * d_sae / needed_memory(config))
    return f"about d_sae={fits:,} fits" if fits else "not even d_sae=1 fits"


def stream_bytes(runs: Sequence[RunData]) -> int:
    """Bytes of the loader of runs that share a stream: two pools on a GPU, or where shards are fetched."""
    if not runs[0].config.device.startswith("cuda") and runs[0].cache.fetcher is None:
        return 0
    names = {name: run for run in runs for name in run.input_names}
    per_row = sum(runs[0].cache.storage.row_bytes(run.width(name)) for name, run in names.items())
    return 2 * runs[0].order.max_pool_rows * per_row


def check_logits(config: TrainConfig, vocab_size: int) -> None:
    """Refuse steps through a language model whose predictions do not fit the memory. Raises ConfigError."""
    needed = FLOAT_BYTES * LOGIT_COPIES * (config.batch_size // config.grad_acc_steps) * vocab_size
    there = available_memory(config.device)
    if there is not None and needed > there:
        raise ConfigError(
            f"batch_size={config.batch_size:,} through a model of {vocab_size:,} tokens needs about "
            f"{byte_size(needed)} of memory for its predictions, {config.device} has {byte_size(there)}: "
            "raise --grad-acc-steps"
        )


def needed_memory(config: TrainConfig) -> int:
    """Bytes of parameters, gradients, optimizer and one micro-batch's pre-activations."""
    copies = OPTIMIZERS[config.optimizer].in_memory + (config.ema_decay is not None)
    return int(parameter_bytes(config) * copies + FLOAT_BYTES * pre_act_entries(config))


def pre_act_entries(config: TrainConfig) -> int:
    """Pre-activations, as float32 numbers, that a micro-batch holds; on a GPU it holds a part at a time."""
    entries = config.batch_size // config.grad_acc_steps * int(config.options["d_sae"])
    return min(entries, CHUNK_ENTRIES) if config.device.startswith("cuda") else entries


def needed_disk(config: TrainConfig) -> int:
    """Bytes of the kept checkpoints, the one being written, and the result."""
    copies = OPTIMIZERS[config.optimizer].on_disk + (config.ema_decay is not None)
    return parameter_bytes(config) * (copies * (config.keep + config.keep_best + 1) + 1)


def available_memory(device: str) -> int | None:
    """Bytes available on a device; None if the system does not report them."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):  # the last one on Windows
        return None


def held_by_others(device: str) -> str:
    """What other processes hold of a GPU's memory, in parentheses after a space; empty where that is little."""
    if not device.startswith("cuda"):
        return ""
    free, total = torch.cuda.mem_get_info(torch.device(device))
    others = total - free - torch.cuda.memory_reserved(device)
    if others < CONTEXT_BYTES:
        return ""
    return f" free of {byte_size(total)} ({byte_size(others)} are held by other processes{_named(device)})"


def _named(device: str) -> str:
    """The other processes on a GPU, where torch can list them (it asks nvidia-smi's library)."""
    try:
        listed = re.findall(r"process\s+(\d+) uses\s+([\d.]+) MB", str(torch.cuda.list_gpu_processes(device)))
    except Exception:  # whatever is missing: this is for a message only
        return ""
    others = [f"process {pid}: {byte_size(float(mb) * 2**20)}" for pid, mb in listed if int(pid) != os.getpid()]
    return f": {', '.join(others)}" if others else ""


def parameter_bytes(config: TrainConfig) -> int:
    """Bytes of the parameters, and of their gradients."""
    with torch.device("meta"):  # sizes without memory
        return FLOAT_BYTES * sum(p.numel() for p in build_sae(config).parameters())
