"""Reads a cache through copies on another disk; imports no torch, so that processes of tests start at once."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from sae_granary import open_cache
from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.remote import fetch
from sae_granary.cache.remote.stage import stage, staging


def staged(cache: Path | str, folder: Path | str, hook: str = "layer_1") -> Cache:
    """A cache whose activations of a hook point are read from copies."""
    opened = open_cache(cache)
    with staging(folder):
        stage(opened, needed(opened, hook))
    return opened


def needed(cache: Cache, hook: str) -> list:
    """The activations of a hook point."""
    holder = cache.holder(hook)
    paths = [holder.layout.activations[hook].shard_path(shard.index) for shard in cache.shards]
    return [
        (path, holder, holder.records[shard.index].files[path]) for path, shard in zip(paths, cache.shards, strict=True)
    ]


def killed_copying(cache: Path, folder: Path, n: int) -> None:
    """Copy in small blocks, and die before the n-th call that changes a name."""
    fetch.BLOCK_BYTES = 64
    calls = 0

    def dying(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        return call

    for name in ("replace", "unlink", "mkdir"):
        setattr(os, name, dying(name))
    staged(cache, folder)


def check_copies(cache: Path, folder: Path) -> None:
    """Assert that copies that are there have the recorded bytes, and that all rows are right once they are complete."""
    opened = open_cache(cache)
    for path, _, entry in needed(opened, "layer_1"):
        for copy in folder.glob(f"toy-*/{path}-*"):
            assert copy.suffix in (".part", ".lock") or hash_file(copy) == entry
    np.testing.assert_array_equal(staged(cache, folder).hook("layer_1")[:], opened.hook("layer_1")[:])
