"""The caches below a folder, in one line each; damaged ones are listed with their error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sae_granary.cache.errors import CacheError, NotACacheError
from sae_granary.cache.format.layout import MANIFEST
from sae_granary.cache.read.reader import open_cache
from sae_granary.cache.read.render import source_name
from sae_granary.common.files import is_code
from sae_granary.common.quantities import byte_size


@dataclass(frozen=True)
class Entry:
    """One cache of a list."""

    path: str
    state: str  # "complete", "incomplete" or "damaged"
    model: str = ""
    hook_points: tuple[str, ...] = ()
    n_rows: int = 0
    dtype: str = ""
    n_bytes: int = 0
    error: str | None = None

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        hooks = ", ".join(self.hook_points[:4]) + (", ..." if len(self.hook_points) > 4 else "")
        return (self.path, self.model, hooks, f"{self.n_rows:,}", self.dtype, byte_size(self.n_bytes), self.state)


def list_caches(root: Path) -> list[Entry]:
    """Every folder right below `root`, or `root` itself, that holds a manifest and is no code."""
    if not root.is_dir():
        raise NotACacheError(f"{root} is not a folder; caches are made by `sae-harvest run`, by default in cache/")
    folders = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    return [_entry(folder) for folder in folders if (folder / MANIFEST).exists() and not is_code(folder)]


def _entry(folder: Path) -> Entry:
    try:
        cache = open_cache(folder, allow_incomplete=True)
    except (CacheError, OSError) as error:
        return Entry(str(folder), "damaged", error=str(error))
    return Entry(
        path=str(folder),
        state="complete" if cache.complete else "incomplete",
        model=source_name(cache.manifest.provenance.get("model")),
        hook_points=tuple(cache.hook_points),
        n_rows=cache.n_rows,
        dtype=cache.dtype,
        n_bytes=cache.n_bytes,
    )
