"""The root of every error that this library raises on purpose, and how messages are worded.

GranaryError
├── CacheError        cache
├── ConfigError       a setting, or a combination of settings, that is invalid (models, harvest, train)
├── HarvestError      harvest
├── ModelError        models
├── SAEError          sae_core
├── TrainError        train
└── LockedError       another process writes here (common.lock)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_SHOWN_CHARACTERS = 300
_LONG_WORD, _LONG_LINE = 400, 2000  # characters; a path has fewer
# What moves a cursor, colors, hides or reorders text on a terminal, or cannot be encoded.
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


class GranaryError(Exception):
    """Base of every package's base error: the commands print its message in one line and exit with `exit_code`."""

    exit_code = 2


class ConfigError(GranaryError, ValueError):
    """A flag or setting, or a combination of them, is invalid."""


def nearest(name: str, known: Iterable[str], *, n: int = 1, cutoff: float = 0.6) -> str:
    """`, did you mean 'x'?` with the up to n closest known names, or an empty string: the end of a message."""
    close = difflib.get_close_matches(name, [other for other in known if other != name], n=n, cutoff=cutoff)
    return f", did you mean {' or '.join(map(repr, close))}?" if close else ""


def printable(text: str, keep: str = "") -> str:
    r"""Text with control characters escaped (\x1b), except those in `keep`: safe to print whatever its source."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


def shortened(text: str) -> str:
    """Each line of a message with the middle of what is very long left out: a value may have any length."""
    return "\n".join(
        _middle_out(re.sub(rf"\S{{{_LONG_WORD + 1},}}", lambda m: _middle_out(m[0], _LONG_WORD), line), _LONG_LINE)
        for line in text.split("\n")
    )


def _middle_out(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest // 4]} ...({len(text):,} characters)... {text[-longest // 4 :]}"


def one_line(error: BaseException) -> str:
    """The first line of a message, at most 300 characters."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + " ..."
