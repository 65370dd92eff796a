"""The model that a cache's activations came from, and sample rows to recognize it by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae_granary.cache.load.selection import Selection
from sae_granary.cache.load.whole_contexts import Contexts, read_contexts
from sae_granary.common.rows import HookPoint

if TYPE_CHECKING:
    from sae_granary.cache.read.reader import Cache

MAX_ROWS = 256


class Origin(NamedTuple):
    """Shapes: N kept tokens of the contexts, D = d_in of the hook point."""

    record: Mapping[str, Any]  # what the manifest says about the model
    point: HookPoint
    contexts: Contexts  # the first of the cache
    rows: NDArray[np.float32]  # (N, D) as stored


def read_origin(cache: Cache, hook: str | None = None) -> Origin:
    """What a model is found again and checked by, with contexts of at most MAX_ROWS rows (or a single longer one).

    `hook` is optional if the cache has one hook point. Raises SelectionError for a cache without contexts.
    """
    point = cache.hook_points[cache.hook_name(hook)]
    contexts = next(read_contexts(cache, point.name, batch_rows=MAX_ROWS, selection=Selection(part="all"), epochs=1))
    index = contexts.row[contexts.keep]
    with cache.reading([point.name]) as enter:
        enter(np.unique(np.searchsorted(cache.starts, index, side="right") - 1).tolist(), ())
        rows = cache.hook(point.name)[index].astype(np.float32)
    return Origin(cache.manifest.model, point, contexts, rows)
