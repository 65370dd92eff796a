"""Remove a whole cache, unless it is in use or holds anything else."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sae_granary.cache.errors import CacheError, NotACacheError
from sae_granary.cache.format.layout import (
    ABOUT,
    ADDED,
    BLOCKS,
    COMMITS,
    DOCUMENTS,
    LOCK,
    LOG,
    MANIFEST,
    TEMPORARY,
    VOCABULARY,
)
from sae_granary.cache.format.manifest import Manifest
from sae_granary.cache.format.records import blocks_of, load_manifest, refuse_code, remove_contents
from sae_granary.cache.write.session import locked
from sae_granary.common.files import TEMP_PREFIX


class InUseError(CacheError):
    """A process has the cache open; it was not removed."""


def check_removable(path: Path) -> Manifest:
    """The manifest of a cache that may be removed.

    Raises NotACacheError for a link and for what is not a cache, InUseError while a process maps its shards (where the
    system shows it), CacheError for files in it that are not the cache's. A harvest is noticed by `remove_cache`.
    """
    with _removal_is_clear(path):
        return _check_removable(path)


@contextlib.contextmanager
def _removal_is_clear(path: Path) -> Iterator[None]:
    """NotACacheError where another process removes the cache meanwhile."""
    try:
        yield
    except CacheError:
        raise
    except FileNotFoundError:
        raise NotACacheError(f"{path} is being removed by another process, or was") from None


def _check_removable(path: Path) -> Manifest:
    if path.is_symlink():
        raise NotACacheError(f"{path} is a link: name the cache itself ({os.readlink(path)}), or remove the link")
    refuse_code(path)
    manifest = load_manifest(path)
    ours = {*manifest.layout.groups, ABOUT, BLOCKS, COMMITS, DOCUMENTS, LOCK, LOG, MANIFEST, TEMPORARY, VOCABULARY}
    ours.add("zarr.json")
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(TEMP_PREFIX)}
    others = sorted(names - ours - {ADDED})
    for part in _additions(path):
        if (part / MANIFEST).is_file() and not part.is_symlink():
            _check_removable(part)
        elif part.is_symlink() or not part.is_dir() or {entry.name for entry in part.iterdir()} - {LOCK, TEMPORARY}:
            others.append(f"{ADDED}/{part.name}")
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise CacheError(f"{path} holds files that are not the cache's ({shown}): move them first; nothing was removed")
    if readers := _readers(path):
        raise InUseError(f"{path} is being read by process {readers[0]}: wait for it or stop it; nothing was removed")
    return manifest


def remove_cache(path: Path) -> None:
    """Remove a cache; the manifest goes last, so that an interrupted removal can be repeated.

    Raises what `check_removable` raises, and CacheLockedError while a harvest writes it. Links inside are removed, not
    followed.
    """
    check_removable(path)
    with _removal_is_clear(path), contextlib.ExitStack() as locks:
        for place in (path, *_additions(path)):
            locks.callback(locked(place).release)
        manifest = _check_removable(path)
        if (blocks := blocks_of(path)) is not None and blocks.growing:
            raise InUseError(f"{path} is being harvested in blocks: stop the harvest first; nothing was removed")
        for name in (ABOUT, LOG):
            (path / name).unlink(missing_ok=True)
        shutil.rmtree(path / TEMPORARY, ignore_errors=True)
        for part in _additions(path):
            if (part / MANIFEST).is_file():
                remove_contents(part, load_manifest(part).layout)
            shutil.rmtree(part)
        with contextlib.suppress(OSError):
            (path / ADDED).rmdir()
        remove_contents(path, manifest.layout)
    with contextlib.suppress(OSError):
        path.rmdir()


def _additions(path: Path) -> list[Path]:
    folder = path / ADDED
    if folder.is_symlink():
        raise NotACacheError(f"{folder} is a link: remove it first; nothing was removed")
    return sorted(folder.iterdir()) if folder.is_dir() else []


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
