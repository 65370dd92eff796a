"""Training time across interruptions, divided among the runs of a process, and rows per second since the start."""

from __future__ import annotations

import time


class Clock:
    """Seconds that a run spent on its steps, including its share of waiting for batches."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._before, self._tokens = seconds, tokens
        self._here = 0.0
        self._since = 0.0
        self._waited: list[float] = []  # for the first batch, for all others

    def __enter__(self) -> Clock:
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._here += time.perf_counter() - self._since

    def add(self, seconds: float) -> None:
        """Add this run's share of seconds that several spent together."""
        self._here += seconds

    def wait(self, seconds: float) -> None:
        """Add seconds spent on waiting for a batch."""
        self._here += seconds
        self._waited = [*self._waited[:1], sum(self._waited[1:]) + seconds] if self._waited else [seconds]

    @property
    def waited(self) -> tuple[float, float]:
        """Seconds in which this process waited for batches, and their share; the first batch always takes a while."""
        seconds = sum(self._waited[1:])
        return seconds, seconds / max(self._here - sum(self._waited[:1]), 1e-9)

    @property
    def seconds(self) -> float:
        """Seconds of training, including earlier processes."""
        return self._before + self._here

    def rate(self, tokens: int) -> float:
        """Rows per second in this process."""
        return (tokens - self._tokens) / max(self._here, 1e-9)
