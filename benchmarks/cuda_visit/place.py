"""Where a part of the visit works."""

import time
from dataclasses import dataclass
from pathlib import Path

CPU_PATIENCE = 10  # on a CPU limits are so many times as long: a test may share its cores


@dataclass(frozen=True)
class Place:
    """The device, and a folder that all parts of a visit share. On a CPU every size is tiny: that tests the script."""

    device: str
    folder: Path

    @property
    def tiny(self) -> bool:
        """Whether this only tests the script."""
        return self.device == "cpu"

    @property
    def kernels(self) -> list[str]:
        """What the sparse products can run on."""
        from sae_granary.sae_core.kernels.choice import triton_installed

        return ["eager", "triton"] if triton_installed() and not self.tiny else ["eager"]

    def wait(self) -> float:
        """Wait until the device has done everything; return the time in seconds."""
        if not self.tiny:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()
