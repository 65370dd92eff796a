"""Peak memory of a contestant: a fresh process over two steps, above what it held before (on a GPU: allocated)."""

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers.contest import Trainer
from benchmarks.peers.contestants import contestants
from benchmarks.peers.rows import rows

MEASURED_STEPS = 2


def memory_of(kind: str, name: str, args: argparse.Namespace) -> int:
    """Peak bytes of one contestant, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.peers", "--memory-of", kind, name]
    for flag in ("d_in", "d_sae", "k", "batch_size", "device", "cache"):
        if getattr(args, flag) is not None:
            command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peak_bytes(kind: str, name: str, args: argparse.Namespace) -> int:
    """Two steps of one contestant: the highest memory above what was held before it was built."""
    x = rows(args)
    trainer = contestants(kind)[name]
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        import sae_lens  # noqa: F401  # so that imports do not count
        import sparsify  # noqa: F401
        from dictionary_learning import trainers  # noqa: F401

        x @ x.t()  # the math library's own buffers
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before = high_water()
    take_steps(trainer, x, args, MEASURED_STEPS)
    return (torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else high_water()) - before


def take_steps(trainer: Trainer, x: Tensor, args: argparse.Namespace, n: int) -> None:
    turns = iter(range(n))

    def turn(took: float | None = None) -> None:
        if next(turns, None) is None:
            raise EnoughError

    with contextlib.suppress(EnoughError):
        trainer(x, args, turn)


class EnoughError(Exception):
    """Ends a training that would go on."""


def high_water() -> int:
    """VmHWM of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory needs Linux, pass --no-memory")
