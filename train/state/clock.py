"""Training time across interruptions, divided among the runs of a process, and rows per second since the start."""

from __future__ import annotations

import time


class Clock:
    """Seconds that a run spent on its steps, including its share of waiting for batches."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._before, self._tokens = seconds, tokens
        self._here = 0.0
        self._since = 0.0

    def __enter__(self) -> Clock:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._here += time.perf_counter() - self._since

    def add(self, seconds: float) -> None:
        """Add seconds measured elsewhere."""
        self._here += seconds

    @property
    def seconds(self) -> float:
        """Seconds of training, including earlier processes."""
        return self._before + self._here

    def rate(self, tokens: int) -> float:
        """Rows per second in this process."""
        return (tokens - self._tokens) / max(self._here, 1e-9)
