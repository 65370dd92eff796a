"""`harvest.run_log` beside the data: times, retries, memory, throughput. Nothing that is compared or checked."""

from __future__ import annotations

import time
from pathlib import Path

from sae_granary.cache.format.layout import LOG


class RunLog:
    """Collects lines, and writes them when the run ends: a cache that was not begun keeps no log."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        self._lines: list[str] = []

    def write(self, message: str) -> None:
        """One line with the time."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._lines.append(f"{stamp} {message.replace(chr(10), ' | ')}\n")

    def close(self, *, keep: bool) -> None:
        """Append the lines to the file."""
        if keep and self._lines:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(self._lines)
        self._lines = []
