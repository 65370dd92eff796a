"""Batches of a cache for training loops of other libraries."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from sae_granary.cache.errors import SelectionError
from sae_granary.cache.load.loader import Loader, Shuffle
from sae_granary.cache.load.selection import Filters, Holdout, Part, Selection
from sae_granary.cache.opening import open_cache
from sae_granary.cache.read.reader import Cache

if TYPE_CHECKING:
    from sae_granary.cache.load.batches import LoaderState

    CachePath = str | os.PathLike[str] | Cache


def batches(
    cache: CachePath,
    hook: str | None = None,
    *,
    batch_size: int = 4096,
    epochs: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    part: Part = "all",
    filters: Filters | None = None,
    state: LoaderState | None = None,
) -> Loader:
    """Iterate over shuffled batches (B, d_in) of a hook point: what `sae-train` trains on, for any other loop.

    Forever, or over `epochs` passes of which the last batch may be short. Each item is a `Batch`: `batch.x` is the
    tensor, `batch.state` continues after it: `batches(..., state=batch.state)`. Close it, or use `with`.

    Args:
        cache: path, name or URL of a cache, or an open one.
        hook: hook point; optional if the cache has one.
        batch_size: rows of a batch.
        epochs: passes over the rows; None repeats forever, each time in another order.
        seed: of the shuffle.
        device: where batches are delivered.
        dtype: of the batches.
        part: all rows, or the train or heldout ones of the split that `sae-train` makes (5 % of the documents).
        filters: rows to leave out. (default: special tokens, and position 0 of decoders)
        state: where to continue.

    >>> from sae_granary import batches
    >>> with batches("cache/demo_l3", batch_size=64, epochs=1) as loader:
    ...     next(loader).x.shape
    torch.Size([64, 384])

    Raises CacheError: no cache, no such hook point, or a batch larger than the rows that there are.
    """
    opened = cache if isinstance(cache, Cache) else open_cache(cache)
    selection = Selection(Filters() if filters is None else filters, Holdout(0.0) if part == "all" else Holdout(), part)
    return Loader(
        opened,
        opened.hook_name(hook),
        batch_size=batch_size,
        order=Shuffle(seed=seed),
        device=device,
        selection=selection,
        dtype=dtype,
        state=state,
        epochs=epochs,
    )


class BatchDataset(IterableDataset[Tensor]):
    """The tensors of `batches` as a torch IterableDataset: `DataLoader(BatchDataset("cache/x"), batch_size=None)`.

    Takes the arguments of `batches`. The loader uses threads, so the DataLoader needs no workers. A
    pass that is broken off is continued by the next one.

    >>> from sae_granary import BatchDataset
    >>> next(iter(BatchDataset("cache/demo_l3", batch_size=64))).shape
    torch.Size([64, 384])

    Raises SelectionError in a worker process, which would deliver every row again.
    """

    def __init__(self, cache: CachePath, hook: str | None = None, **options: Any) -> None:
        super().__init__()
        self._make: Callable[..., Loader] = functools.partial(batches, cache, hook, **options)
        self.state: LoaderState | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """One pass, or an endless one."""
        if get_worker_info() is not None:
            raise SelectionError("num_workers must be 0: each worker would deliver every row; the loader has threads")
        with self._make(state=self.state) as loader:
            for batch in loader:
                self.state = batch.state
                assert isinstance(batch.x, Tensor)
                yield batch.x
        self.state = None
