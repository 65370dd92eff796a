"""A cache at a URL is read through a local copy: complete, verified, kept for later runs, and bounded in size.

The copy is made before the first row is read; where a cache is read shard by shard (`cache.remote.shards`), all of it
but the activations, in a separate folder. Copies are in GRANARY_REMOTE_DIR (default ~/.cache/granary/remote) and
take at most GRANARY_REMOTE_BYTES together (default 100 GiB): those unused for longest are removed, never one in use.
With a folder for copies on a disk of this machine (`--stage`) they are there, and without GRANARY_REMOTE_BYTES the
disk is the limit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

from sae_granary.cache.errors import CacheError, CacheLockedError, NotACacheError
from sae_granary.cache.format.layout import MANIFEST, TEMPORARY
from sae_granary.cache.format.places import PARTIAL, find_cache, is_partial
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.read.listing import bytes_in
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.remote.fetch import last_used
from sae_granary.cache.remote.pull import STAGE, WANTED, PullPlan, plan_pull, pull
from sae_granary.cache.remote.shards import ShardFetcher
from sae_granary.cache.remote.stage import stage_folder
from sae_granary.cache.remote.store import AGAIN, RemoteError, is_url
from sae_granary.cache.write.remove import remove_cache
from sae_granary.cache.write.session import locked
from sae_granary.common.errors import one_line
from sae_granary.common.files import free_bytes, home_path
from sae_granary.common.lock import hold, try_alone
from sae_granary.common.quantities import byte_size, parse_count
from sae_granary.common.signed import digest
from sae_granary.common.threads import waiting

FOLDER, LIMIT = "GRANARY_REMOTE_DIR", "GRANARY_REMOTE_BYTES"
DEFAULT_LIMIT = 100 << 30


def locate(path: str | os.PathLike[str], *, by_shard: bool = False) -> Path:
    """The local folder of a cache that is named by path, by name (GRANARY_CACHE_DIR) or by URL, which is copied."""
    return mirrored(str(path), by_shard=by_shard) if is_url(path) else find_cache(path)


def mirrored(url: str, *, by_shard: bool = False) -> Path:
    """The local copy of a remote cache, brought up to date; a complete one is used where the remote is out of reach.

    With `by_shard` it is without the activations (`is_partial`), unless there is a whole one. Raises RemoteError,
    CorruptCacheError for a wrong byte, CacheError for a cache that is larger than the limit.
    """
    url = url.rstrip("/")
    folder = _root() / f"{url.rpartition('/')[2]}-{digest(url.encode())[:12]}"
    if by_shard and not (folder / MANIFEST).exists():
        folder = folder.with_name(folder.name + PARTIAL)
    try:
        plan = plan_pull(url, folder, partial=is_partial(folder))
    except RemoteError as error:
        if not (folder / MANIFEST).exists() or not load_manifest(folder).complete:
            raise
        sys.stderr.write(f"{one_line(error)}; reading the local copy {folder}\n")
        return folder
    except NotACacheError as error:  # perhaps a disk that is not mounted
        if (folder / MANIFEST).exists() and not is_partial(folder):
            error.args = (f"{error}; its local copy is complete: --cache {folder} reads it",)
        raise
    except CacheError as error:
        if folder.exists():
            error.args = (f"{error}; its local copy is {folder}: remove that folder to copy it again",)
        raise
    if is_partial(folder):
        records = [record for each in (plan, *plan.added) for record in each.parcel.manifest.shards]
        _make_room(folder, max(_limit() - sum(record.n_bytes for record in records), 0))
    if not plan.complete:
        needed, limit = plan.total_bytes, _limit()
        if needed > limit:
            raise CacheError(
                f"{url} has {byte_size(needed)}, local copies may take {byte_size(limit)}: raise {LIMIT}, or "
                f"`sae-cache pull {url} FOLDER --hook NAME --rows N` copies a part"
            )
        _make_room(folder, limit - needed)
        sys.stderr.write(f"copying {url} ({byte_size(plan.n_bytes)}) to {folder}\n")
        _pull(plan, url, folder)
    with contextlib.suppress(OSError):
        os.utime(folder)  # used now
    return folder


def hold_copy(url: str, *, by_shard: bool) -> tuple[Path, int]:
    """As `mirrored`, and a descriptor: until it is closed no other process makes room by removing the copy."""
    while True:
        folder = mirrored(url, by_shard=by_shard)
        if (held := hold(folder / MANIFEST)) is not None:
            return folder, held
        time.sleep(AGAIN)  # it is being removed: copied again


def fetcher_of(cache: Cache, url: str) -> ShardFetcher:
    """Fetches the activations of a partial copy, within what copies may take."""
    root, limit = cache.path.parent, _limit()

    def free() -> int:
        return min(limit - bytes_in(root), free_bytes(root))

    return ShardFetcher(cache, cache.path, url, free)


def _pull(plan: PullPlan, url: str, folder: Path) -> None:
    """Copy it, or wait for another process that does: a rank of the same machine."""
    with waiting(f"copying {url} to {folder}, or waiting for another process that does"):
        while not plan.complete:
            try:
                pull(plan)
                return
            except CacheLockedError:
                time.sleep(AGAIN)
                plan = plan_pull(url, folder, partial=is_partial(folder))


def _root() -> Path:
    if folder := stage_folder():
        folder.mkdir(exist_ok=True)
        return folder
    return home_path(os.environ.get(FOLDER) or "~/.cache/granary/remote")


def _limit() -> int:
    text = os.environ.get(LIMIT)
    try:
        return parse_count(text) if text else sys.maxsize if stage_folder() else DEFAULT_LIMIT
    except ValueError as error:
        raise CacheError(f"{LIMIT}={text!r}: {error}") from None


def _make_room(folder: Path, allowed: int) -> None:
    """Remove other copies, those unused for longest first, until they take no more than `allowed` bytes.

    Copies of which only a part has arrived count, and go the same way.
    """
    places = [place for place in folder.parent.glob("*") if place != folder and not place.is_symlink()]
    others = [place for place in places if _is_half(place) or (place / MANIFEST).exists()]
    sizes = {other: bytes_in(other) for other in others}
    for other in sorted(others, key=last_used):
        if sum(sizes.values()) <= allowed:
            return
        with contextlib.suppress(CacheError, OSError):  # in use, not ours to remove, or another process removes it
            if _is_half(other):
                with locked(other):  # raises while the pull runs
                    shutil.rmtree(other)
            else:
                with try_alone(other / MANIFEST, unknown=True) as alone:
                    if alone:
                        remove_cache(other)
        sizes[other] = bytes_in(other)


def _is_half(folder: Path) -> bool:
    """Whether a folder holds a first pull that has not finished, and nothing else."""
    return (folder / TEMPORARY / STAGE / WANTED).is_file() and not (folder / MANIFEST).exists()
