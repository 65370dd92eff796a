"""`--stage`: runs read their cache from a disk of this machine."""

from __future__ import annotations

from sae_granary.cache.remote.stage import stage as stage_files
from sae_granary.cache.remote.stage import stage_folder
from sae_granary.train.data.run_data import RunData


def stage(*runs: RunData, copy: bool = True) -> None:
    """Copy what runs of one cache read of it to the folder of `--stage`, and have the first read it there.

    Without `copy` only the folder and its space are checked. Does nothing without such a folder.
    Raises ConfigError for a folder that there is not, CacheError where there is no space, CorruptCacheError.
    """
    if stage_folder() is not None:
        needed = (file for data in runs for file in data.cache.files_of(data.config.hook))
        found = {(cache.path, path): (path, cache, entry) for path, cache, entry in needed}
        stage_files(runs[0].cache, list(found.values()), copy=copy)
