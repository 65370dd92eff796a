"""Clear errors for a full disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_granary.cache.errors import DiskFullError
from sae_granary.common.files import NO_SPACE, free_bytes


@contextmanager
def no_space_is_clear(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a DiskFullError that says how much is missing."""
    try:
        yield
    except DiskFullError:
        raise
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise DiskFullError(path, needed_bytes, free_bytes(path)) from error
