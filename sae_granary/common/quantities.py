"""Quantities in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A time in the unit that a person would say it in."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
