"""The caches below a folder, in one line each; damaged ones are listed with their error."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_granary.cache.errors import CacheError, NotACacheError
from sae_granary.cache.format.layout import LOCK, MANIFEST
from sae_granary.cache.format.places import is_partial
from sae_granary.cache.format.records import blocks_of, bytes_in_blocks
from sae_granary.cache.read.reader import open_local
from sae_granary.cache.read.render import source_name
from sae_granary.common.imports.code import is_code
from sae_granary.common.lock import lock_holder
from sae_granary.common.quantities import byte_size, duration

SORTS = ("path", "model", "rows", "size", "age")


@dataclass(frozen=True)
class Entry:
    """One cache of a list."""

    path: str
    state: str  # "complete", "growing" (a harvest writes it now), "incomplete", "partial" (`is_partial`) or "damaged"
    model: str = ""
    dataset: str = ""
    hook_points: tuple[str, ...] = ()
    n_rows: int = 0
    dtype: str = ""
    n_bytes: int = 0
    age_seconds: float = 0.0  # since the manifest was written
    error: str | None = None

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        hooks = ", ".join(self.hook_points[:4]) + (", ..." if len(self.hook_points) > 4 else "")
        rows, size, age = f"{self.n_rows:,}", byte_size(self.n_bytes), duration(self.age_seconds)
        return (self.path, self.model, hooks, rows, self.dtype, size, self.dataset, age, self.state)


COLUMNS = ("cache", "model", "hook points", "rows", "dtype", "size", "data", "age", "state")


def list_caches(roots: Path | Sequence[Path], *, sort: str = "path") -> list[Entry]:
    """Every cache in folders, at any depth. Code, hidden folders and links are left out, and nothing inside a cache.

    `sort` is one of SORTS: path and model ascend, the largest and the newest come first. Raises NotACacheError for a
    root that is not a folder.
    """
    roots = [roots] if isinstance(roots, Path) else list(roots)
    for root in roots:
        if not root.is_dir():
            raise NotACacheError(f"{root} is not a folder; caches are made by `sae-harvest run`, by default in cache/")
    found = dict.fromkeys(folder for root in roots for folder in _folders(root))
    entries = [entry for folder in found if (entry := _entry(folder)) is not None]
    return sorted(entries, key=_KEYS[sort])


_KEYS = {
    "path": lambda entry: entry.path,
    "model": lambda entry: (entry.model, entry.path),
    "rows": lambda entry: -entry.n_rows,
    "size": lambda entry: -entry.n_bytes,
    "age": lambda entry: entry.age_seconds,
}


def _folders(root: Path) -> Iterator[Path]:
    for name, inner, files in os.walk(root, followlinks=False):
        folder = Path(name)
        if MANIFEST in (*files, *inner) and not is_code(folder):
            inner.clear()
            yield folder
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__")))


def _entry(folder: Path) -> Entry | None:
    """The entry of a cache; None where it was removed meanwhile."""
    age, partial = 0.0, is_partial(folder)
    try:
        age = max(0.0, time.time() - (folder / MANIFEST).lstat().st_mtime)
        cache = open_local(folder, allow_incomplete=True, partial=partial)
        blocks = blocks_of(folder)
    except (CacheError, OSError) as error:
        if not os.path.lexists(folder / MANIFEST):
            return None
        holder = lock_holder(folder / LOCK)
        told = f"{error}" + (f" (in use by {holder}: perhaps being removed)" if holder else "")
        return Entry(str(folder), "damaged", age_seconds=age, error=told)
    writing = [folder, *(part.path for part in cache.additions)]
    growing = any(lock_holder(place / LOCK) is not None for place in writing) or (blocks is not None and blocks.growing)
    return Entry(
        path=str(folder),
        state="partial" if partial else "growing" if growing else "complete" if cache.complete else "incomplete",
        model=source_name(cache.manifest.provenance.get("model")),
        dataset=source_name(cache.manifest.provenance.get("dataset")),
        hook_points=tuple(cache.hook_points),
        n_rows=cache.n_rows or (blocks.n_rows if blocks is not None else 0),
        dtype=cache.dtype,
        n_bytes=bytes_in(folder) if partial else cache.n_bytes + bytes_in_blocks(folder),
        age_seconds=age,
    )


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder but its locks; other processes may remove some meanwhile."""
    n_bytes = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(os.path.join(place, name))
                n_bytes += status.st_size if stat.S_ISREG(status.st_mode) and name != LOCK else 0
    return n_bytes
