"""The throughput of a harvest, measured on its first texts; nothing is written."""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass

from sae_granary.cache.write.committed import Committed
from sae_granary.common.errors import ConfigError
from sae_granary.common.quantities import duration
from sae_granary.harvest.errors import NoRowsError
from sae_granary.harvest.pipeline import Pipeline
from sae_granary.harvest.prepare import Prepared
from sae_granary.harvest.progress import Progress, RunLog
from sae_granary.harvest.replay.one_shard import Unwritten
from sae_granary.harvest.run import load

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Probe:
    """What was measured: rows that went through the model, and the seconds from the first text to the last batch."""

    n_rows: int
    seconds: float
    unit: str

    def words(self, n_rows: int | None) -> str:
        """The time that so many rows will take, and how it is known."""
        rate = self.n_rows / self.seconds
        total = "not known" if n_rows is None else f"about {duration(n_rows / rate)} after loading"
        return (
            f"{total}: measured {rate:,.0f} {self.unit}s/s over the first "
            f"{self.n_rows:,} {self.unit}s in {duration(self.seconds)}, without writing"
        )


def parse_seconds(text: str) -> float:
    """`30s`, `2min`, `1h` or `30` in seconds. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--probe {text}: expected a time above 0, such as 30s or 2min")
    return float(match[1]) * _UNITS[match[2]]


def probe(prepared: Prepared, seconds: float, progress: Progress) -> Probe:
    """Send the first texts through tokenizer, model and copy for so long, at least one batch; loads the model."""
    progress.say(f"loading {prepared.located.name} ({prepared.compute_dtype}, {prepared.device})")
    prepared, model = load(prepared, progress.say)
    progress.say(f"measuring for {duration(seconds)}")
    counted = _Counted(prepared.unit, None, quiet=True)
    nothing = Unwritten(prepared.config.out_path, Committed())

    def check() -> None:
        if counted.n_rows and counted.elapsed >= seconds:
            raise _OverError

    with contextlib.suppress(_OverError):
        Pipeline(prepared, model, nothing, counted, RunLog(prepared.config.out_path), check).fill()
    if not counted.n_rows:
        raise NoRowsError(prepared.source.name, "", prepared.source.columns)
    return Probe(counted.n_rows, counted.elapsed, prepared.unit)


class _OverError(Exception):
    """The time is over."""


class _Counted(Progress):
    """Counts rows and the time until the last of them."""

    n_rows = 0
    elapsed = 0.0

    def advance(self, n_rows: int, bytes_written: int) -> None:
        self.n_rows += n_rows
        self.elapsed = time.perf_counter() - self._start
