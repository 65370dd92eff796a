"""Numbers as people write and read them: counts with suffixes, durations, sizes in bytes."""

from __future__ import annotations

import re
from decimal import Decimal

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_COUNT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)([kmbgt]?)")
_MAX_DIGITS = 25  # more than a 64-bit number has, fewer than Decimal divides exactly
COUNT_WORDS = "a whole number such as 20000, 20k, 5M or 1.5B"


def parse_count(text: str) -> int:
    """`5M` -> 5,000,000: suffixes k, M, B or G, and T in either case; also `1e6` and `20_000`.

    Raises ValueError for what is no whole number, also for `20,000`: with a comma it could be two numbers.
    """
    match = _COUNT.fullmatch(text.strip().lower().replace("_", ""))
    number = Decimal("nan") if match is None else Decimal(match[1]) * _SUFFIXES[match[2]]
    if match is None or number.adjusted() >= _MAX_DIGITS or number % 1:
        raise ValueError(f"{text!r}: expected {COUNT_WORDS}")
    return int(number)


def quantity(value: float) -> str:
    """1234 -> 1.2k, 5e6 -> 5.0M, 2.5e9 -> 2.5B."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.0f}"


def counted(n: int, noun: str) -> str:
    """1 block, 1,200 blocks: a number of something whose plural ends with s."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """A duration in a readable unit: 8.2 s, 42 s, 5 min, 2.5 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def byte_size(n_bytes: float) -> str:
    """A size in binary units: 900 B, 1.5 KiB, 23.4 GiB."""
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
