"""The on-disk activation cache: `cache.open(path)` reads one, `cache.writer.CacheWriter` writes one.

Importing this package imports neither numpy, zarr nor torch; `FORMAT.md` beside this file is the byte-level promise.
"""

from __future__ import annotations

from collections.abc import Collection
from os import PathLike
from typing import TYPE_CHECKING

from cache.errors import CacheError

if TYPE_CHECKING:
    from cache.reader import Cache

__all__ = ["CacheError", "open"]


def open(path: str | PathLike[str], *, shards: Collection[int] | None = None, allow_incomplete: bool = False) -> Cache:
    """Open a cache for reading; see `cache.reader.open_cache`."""
    from cache.reader import open_cache

    return open_cache(path, shards=shards, allow_incomplete=allow_incomplete)
