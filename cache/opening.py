"""Open a cache by its path, by its name in GRANARY_CACHE_DIR, or by its URL, which is copied first."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection

from sae_granary.cache.format.places import is_partial
from sae_granary.cache.read.reader import Cache, open_local
from sae_granary.cache.remote.mirror import fetcher_of, hold_copy
from sae_granary.cache.remote.store import is_url


def open_cache(
    path: str | os.PathLike[str],
    *,
    shards: Collection[int] | None = None,
    allow_incomplete: bool = False,
    by_shard: bool = False,
) -> Cache:
    """Open a cache: all its committed shards, or those numbered in `shards`.

    Existence and exact size of every file of the opened shards are checked here; checksums are `verify`'s. Where the
    manifest is larger than 4 MiB (about 3,000 shards), the sizes are checked when a shard is read.
    A cache whose harvest has not finished needs `allow_incomplete`; it is read in its present state. While a complete
    cache is extended, `allow_incomplete` gives the shards that the extension has committed, too.

    With `by_shard` the activations of a URL are fetched when a loader comes to their shards, in groups
    (`Shuffle.shuffle_shards`), and dropped when others need their space (GRANARY_REMOTE_BYTES).

    >>> from sae_granary import open_cache
    >>> rows = open_cache("cache/demo_l3")
    >>> rows.hook("layer_3")[:4].shape, rows.document(0).source
    ((4, 384), 'pydoc_data.topics:assert')

    Raises NotACacheError, IncompleteCacheError, UnsupportedFormatError, CorruptCacheError (a file is missing or of
    another size), and UnknownNameError for a shard that is not there.
    """
    if not is_url(path):
        return open_local(path, shards=shards, allow_incomplete=allow_incomplete)
    folder, held = hold_copy(str(path), by_shard=by_shard)
    try:
        partial = is_partial(folder)
        opened = open_local(folder, shards=shards, allow_incomplete=allow_incomplete, partial=partial)
        if partial:
            opened.fetcher = fetcher_of(opened, str(path))
    except BaseException:
        os.close(held)
        raise
    weakref.finalize(opened, os.close, held)
    return opened
