"""What train raises.

TrainError(GranaryError)
├── RunExistsError(TrainError, FileExistsError) the run's folder holds another run
├── CheckpointError(TrainError, ValueError)    a checkpoint is damaged or belongs to something else
├── DivergedError(TrainError, ArithmeticError) steps keep failing with NaN or Inf
├── FilesDifferError(TrainError, ValueError)   the files of a finished run give another SAE than was trained
├── ShortageError(TrainError, OSError)         the disk is full, or no more files may be opened
├── RankError(TrainError, ConnectionError)      another rank of the training is missing, failed or gone
├── MemoryLimitError(TrainError, MemoryError)   the memory of the device is full
└── InterruptedRunError(TrainError)            a signal stopped the run after a checkpoint

Settings that are unknown, of the wrong type or out of range are a `ConfigError` of `sae_granary.common.errors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_granary.common.errors import GranaryError
from sae_granary.common.files import shortage
from sae_granary.common.signals import StopRequest


class TrainError(GranaryError):
    """Base of every error that train raises on purpose."""


class RunExistsError(TrainError, FileExistsError):
    """The run's folder exists; nothing in it was touched."""


class CheckpointError(TrainError, ValueError):
    """A checkpoint is damaged, or belongs to another cache, type or version."""


class DivergedError(TrainError, ArithmeticError):
    """Too many steps in a row were rejected for NaN or Inf."""


class FilesDifferError(TrainError, ValueError):
    """The files of a finished run give another reconstruction than the SAE that was trained; checkpoints are kept."""


class ShortageError(TrainError, OSError):
    """The disk is full, or no more files may be opened; what was saved stays valid."""


class RankError(TrainError, ConnectionError):
    """Another rank of the training did not come, failed, or stopped answering; what was saved stays valid."""


class MemoryLimitError(TrainError, MemoryError):
    """The memory of the device is full; what was saved stays valid."""


@contextmanager
def shortage_is_clear(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Raise ShortageError, with what is needed and free, for a full disk or too many open files inside the block."""
    try:
        yield
    except OSError as error:
        if isinstance(error, TrainError) or (text := shortage(error, folder, needed_bytes)) is None:
            raise
        raise ShortageError(f"{text}; fix this, then run: sae-train resume {folder}") from error


class InterruptedRunError(TrainError):
    """SIGTERM or SIGINT: the run stopped after a step and a checkpoint."""

    def __init__(self, signum: int, step: int, folder: Path) -> None:
        self.signum, self.step, self.folder, self.exit_code = signum, step, folder, 128 + signum
        super().__init__(f"stopped by signal {signum} after step {step}; continue with: sae-train resume {folder}")

    @classmethod
    def raise_if(cls, stop: StopRequest, step: int, folder: Path) -> None:
        """Raise this error if a stop was requested."""
        if stop.signum is not None:
            raise cls(stop.signum, step, folder)
