"""Hook points that were added to a cache, at a remote: each addition is a cache in a folder below `added/`."""

from __future__ import annotations

from collections.abc import Collection

from sae_granary.cache.format.layout import ADDED, MANIFEST
from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.read.added import is_folder_name
from sae_granary.cache.remote.parcel import parse
from sae_granary.cache.remote.store import MARKER, Store


def remote_additions(store: Store, there: Collection[str]) -> dict[str, Manifest]:
    """Folder name -> manifest of the additions that are there as a whole. Raises CacheError for a damaged manifest."""
    paths = {name: f"{ADDED}/{name}/{MANIFEST}" for name in _folders(there, MANIFEST)}
    return {name: parse(store.read(path), f"{store.url}/{path}") for name, path in paths.items()}


def half_pushed(there: Collection[str]) -> tuple[str, ...]:
    """The folder names of additions of which a first push has not finished."""
    return tuple(sorted(set(_folders(there, MARKER)) - set(_folders(there, MANIFEST))))


def _folders(there: Collection[str], file: str) -> list[str]:
    parts = [path.split("/") for path in sorted(there)]
    return [p[1] for p in parts if len(p) == 3 and p[0] == ADDED and p[2] == file and is_folder_name(p[1])]
