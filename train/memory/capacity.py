"""Memory and disk that a run needs, checked before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sae_granary.common.errors import ConfigError
from sae_granary.common.files import free_bytes
from sae_granary.common.quantities import byte_size
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.optim.optimizers import OPTIMIZERS

FLOAT_BYTES = 4
LOGIT_COPIES = 6  # clean and spliced, their log-probabilities, gradients


def check_capacity(config: TrainConfig) -> None:
    """Refuse a run that cannot fit. Raises ConfigError with what is needed and what is available."""
    memory, disk = needed_memory(config), needed_disk(config)
    there = available_memory(config.device)
    if there is not None and memory > there:
        per_latent = memory / config.options["d_sae"]
        raise ConfigError(
            f"d_sae={config.options['d_sae']:,} with batch_size={config.batch_size:,} needs about {byte_size(memory)} "
            f"of memory, {config.device} has {byte_size(there)}: about d_sae={int(there / per_latent):,} fits; "
            "or raise --grad-acc-steps"
        )
    free = free_bytes(Path(config.runs_dir))
    if disk > free:
        raise ConfigError(
            f"{config.runs_dir} has {byte_size(free)} free, the run's checkpoints need about {byte_size(disk)}: "
            "free space, lower --keep, or choose another --runs-dir"
        )


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
    micro_batch = config.batch_size // config.grad_acc_steps
    pre_acts = micro_batch * config.options["d_sae"]
    return int(FLOAT_BYTES * (_n_parameters(config) * copies + pre_acts))


def needed_disk(config: TrainConfig) -> int:
    """Bytes of the kept checkpoints, the one being written, and the result."""
    copies = OPTIMIZERS[config.optimizer].on_disk + (config.ema_decay is not None)
    return FLOAT_BYTES * _n_parameters(config) * (copies * (config.keep + config.keep_best + 1) + 1)


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


def parameter_bytes(config: TrainConfig) -> int:
    """Bytes of the parameters, and of their gradients."""
    return FLOAT_BYTES * _n_parameters(config)


def _n_parameters(config: TrainConfig) -> int:
    """Parameters of the encoder and the decoder; everything else is negligible."""
    return 2 * int(config.options["d_in"]) * int(config.options["d_sae"])
