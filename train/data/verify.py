"""`--verify`: the checksums of the files that a run is about to read, before it trains."""

from __future__ import annotations

from sae_granary.cache.errors import CacheError, CorruptCacheError
from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.read.check import check_file
from sae_granary.cache.remote.store import is_url
from sae_granary.common.threads import waiting
from sae_granary.train.data.run_data import RunData


def verify_files(runs: list[RunData]) -> None:
    """Hash what runs of one cache read of it: activations and norms of their hook points, and all columns of rows.

    Only the shards that the runs were opened on. Raises CorruptCacheError at the first file that is not as recorded.
    """
    files = {path: (cache, entry) for data in runs for path, cache, entry in data.cache.files_of(data.config.hook)}
    fetches = runs[0].cache.fetcher is not None
    total, done = sum(entry.n_bytes for _, entry in files.values()), 0
    with waiting(f"verifying {len(files):,} files of {runs[0].cache.path}") as progress:
        for name, (cache, entry) in files.items():
            try:
                check_file(cache.path / name, entry.n_bytes)
                found = hash_file(cache.path / name)
            except (CacheError, OSError) as error:
                if fetches and not (cache.path / name).exists():
                    continue  # not here, or not any more: checked when it is fetched
                raise CorruptCacheError(f"{error}; {_remedy(runs[0])}") from error
            if found != entry:
                raise CorruptCacheError(
                    f"{cache.path / name} is damaged: its checksum is {found.xxh3}, expected {entry.xxh3}; "
                    f"{_remedy(runs[0])}"
                )
            done += entry.n_bytes
            progress(done / total)


def _remedy(data: RunData) -> str:
    if is_url(data.config.cache):
        return "remove it, and the next run fetches it again; nothing was trained"
    return f"restore it with `sae-harvest repair {data.cache.path}` or from a copy, nothing was trained"
