"""Reads a cache through copies on another disk; imports no torch, so that processes of tests start at once."""

from pathlib import Path

from sae_granary import open_cache
from sae_granary.cache.read.reader import Cache
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
