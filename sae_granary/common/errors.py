"""The root of every error that this library raises on purpose, and how messages are worded.

GranaryError
├── CacheError        cache
├── ConfigError       a setting, or a combination of settings, that cannot be (models, harvest)
├── HarvestError      harvest
├── ModelError        models
├── SAEError          sae_core
├── TrainError        train
└── LockedError       another process writes here (common.lock)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN_CHARACTERS = 300


class GranaryError(Exception):
    """Base of every package's base error: the commands print its message in one line and exit with `exit_code`."""

    exit_code = 2


class ConfigError(GranaryError, ValueError):
    """A flag or setting, or a combination of them, that cannot be."""


def nearest(name: str, known: Iterable[str], *, n: int = 1, cutoff: float = 0.6) -> str:
    """`, did you mean 'x'?` with the up to n closest known names, or an empty string: the end of a message."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=cutoff)
    return f", did you mean {' or '.join(map(repr, close))}?" if close else ""


def one_line(error: BaseException) -> str:
    """The first line of a message that may be a page long, at most 300 characters of it."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + " ..."
