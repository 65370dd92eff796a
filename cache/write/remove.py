"""Remove a whole cache, unless it is in use or holds anything else."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from sae_granary.cache.errors import CacheError, NotACacheError
from sae_granary.cache.format.layout import ABOUT, ADDED, COMMITS, DOCUMENTS, LOCK, LOG, MANIFEST, TEMPORARY, VOCABULARY
from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.format.records import load_manifest, refuse_code, remove_contents
from sae_granary.cache.write.session import locked


class InUseError(CacheError):
    """A process has the cache open; it was not removed."""


def check_removable(path: Path) -> Manifest:
    """The manifest of a cache that may be removed.

    Raises NotACacheError for a link and for what is not a cache, InUseError while a process maps its shards (where the
    system tells), CacheError for files in it that are not the cache's. A harvest is noticed by `remove_cache`.
    """
    if path.is_symlink():
        raise NotACacheError(f"{path} is a link: name the cache itself ({os.readlink(path)}), or remove the link")
    refuse_code(path)
    manifest = load_manifest(path)
    ours = {
        *manifest.layout.groups,
        ABOUT,
        ADDED,
        COMMITS,
        DOCUMENTS,
        LOCK,
        LOG,
        MANIFEST,
        TEMPORARY,
        VOCABULARY,
        "zarr.json",
    }
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in ours)
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise CacheError(f"{path} holds files that are not the cache's ({shown}): move them first; nothing was removed")
    for part in _added(path):
        check_removable(part)
    if readers := _readers(path):
        raise InUseError(f"{path} is being read by process {readers[0]}: wait for it or stop it; nothing was removed")
    return manifest


def remove_cache(path: Path) -> None:
    """Remove a cache with the hook points added to it; its manifest goes last, so that a removal can be repeated.

    Raises what `check_removable` raises, and CacheLockedError while a harvest writes it. Links inside are removed, not
    followed.
    """
    check_removable(path)
    lock = locked(path)
    try:
        manifest = check_removable(path)
        for part in _added(path):
            remove_cache(part)
        _remove_folder(path / ADDED)
        for name in (ABOUT, LOG):
            (path / name).unlink(missing_ok=True)
        shutil.rmtree(path / TEMPORARY, ignore_errors=True)
        remove_contents(path, manifest.layout)
    finally:
        lock.release()
    with contextlib.suppress(OSError):
        path.rmdir()


def _added(path: Path) -> list[Path]:
    """The caches of hook points that were added; a link to a folder of them is not followed."""
    folder = path / ADDED
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _remove_folder(folder: Path) -> None:
    """Remove an empty folder, or a link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        folder.rmdir()


def _readers(path: Path) -> list[int]:
    """Other processes of ours that map a file of the cache; none where there is no /proc."""
    inside, found = f"{path.resolve()}{os.sep}", []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                with (
                    contextlib.suppress(OSError),
                    open(f"/proc/{name}/maps", encoding="utf-8", errors="replace") as maps,
                ):
                    if any(inside in line for line in maps):
                        found.append(int(name))
    return found
