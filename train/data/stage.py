"""`--stage`: runs read their cache from a disk of this machine."""

from __future__ import annotations

from sae_granary.cache.load.plan import n_groups_of
from sae_granary.cache.remote.stage import stage as stage_files
from sae_granary.cache.remote.stage import stage_folder
from sae_granary.train.data.run_data import RunData


def stage(*runs: RunData, copy: bool = True) -> None:
    """Copy what runs of one cache read of it to the folder of `--stage`, and have the first read it there.

    Where shards are shuffled in groups, activations are copied when they are read. Without `copy` only the folder and
    its space are checked. Without such a folder only the space for shards of a URL is.
    Raises ConfigError for a folder that there is not, CacheError where there is no space, CorruptCacheError.
    """
    main = runs[0].cache
    if stage_folder() is not None:
        needed = (file for data in runs for file in data.cache.files_of(data.config.hook))
        found = {(cache.path, path): (path, cache, entry) for path, cache, entry in needed}
        by_shard = all(data.config.shuffle_shards is not None for data in runs)
        stage_files(main, list(found.values()), copy=copy, by_shard=by_shard)
    if main.fetcher is not None:
        streams: dict[object, list[RunData]] = {}  # by which loader feeds them
        for data in runs:
            streams.setdefault(data.stream_key, []).append(data)
        for together in streams.values():
            hooks = {hook: None for data in together for hook in data.config.hook}
            n_groups = n_groups_of(len(main.shards), together[0].config.shuffle_shards)
            # Of ranks one may have come to the next group while another reads, and evaluates on a third one.
            n_held = 3 if max(together[0].share.n, together[0].shards.n) > 1 else 2
            main.fetcher.check(list(hooks), -(-len(main.shards) // n_groups), n_held)
