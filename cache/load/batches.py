"""Batches from planned pools: cut, copied in the background, delivered in order with the state after each.

On a CPU each batch is copied by one thread of a few, so that none of them waits for another within a batch; the
consumer's thread hands out the batches ahead of the one that it takes. On a GPU
taking a batch is a launch on the consumer's stream, with nothing to gain from a thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_granary.cache.load.pools import Pool, PoolSource, Taken
from sae_granary.cache.load.staging import n_copy_threads
from sae_granary.common.threads import THREADS, Prefetch, in_background

BATCHES_AHEAD = 4


@dataclass(frozen=True)
class LoaderState:
    """The position of a loader. The cursor counts the rows of the epoch's order, filtered ones included."""

    seed: int
    epoch: int = 0
    cursor: int = 0


@dataclass(frozen=True)
class Share:
    """Part `index` of `n` of every batch: contiguous rows, whose numbers differ by one row at most.

    A batch that is trained on in `pieces` (micro-batches) is divided piece by piece, so that each piece has rows in
    every part. Which rows are in a batch, and their order, does not depend on n.
    """

    index: int = 0
    n: int = 1
    pieces: int = 1

    def ranges(self, n_rows: int) -> list[tuple[int, int]]:
        """Start and end of this part's rows in each piece of a batch of n rows; pieces are those of `Tensor.chunk`."""
        if self.n == 1:
            return [(0, n_rows)]
        size = -(-n_rows // self.pieces)
        starts = range(0, n_rows, size)
        lengths = [min(size, n_rows - start) for start in starts]
        pieces = zip(starts, lengths, strict=True)
        return [(start + k * self.index // self.n, start + k * (self.index + 1) // self.n) for start, k in pieces]

    def sizes(self, n_rows: int) -> list[int]:
        """How many rows this part has in each piece of a batch of n rows."""
        return [end - start for start, end in self.ranges(n_rows)]


WHOLE = Share()


@dataclass(frozen=True)
class Batch:
    """B rows on the device, and the state after them."""

    x: Tensor | dict[str, Tensor]  # (B, D), or one per hook point, rows aligned
    state: LoaderState
    row_ids: Tensor | None = None  # (B,) permanent row ids, on the CPU, when asked for

    @property
    def n_rows(self) -> int:
        """B."""
        return len(self.x) if isinstance(self.x, Tensor) else len(next(iter(self.x.values())))


@dataclass(frozen=True)
class _Begun:
    """A batch whose rows are being copied, in pieces where it spans pools."""

    pieces: list[Callable[[], Taken]]  # each waits for its copy
    state: LoaderState

    def finish(self) -> Batch:
        taken = [piece() for piece in self.pieces]
        rows = {hook: _join([rows[hook] for rows, _ in taken]) for hook in taken[0][0]}
        ids = [ids for _, ids in taken if ids is not None]
        return Batch(rows, self.state, torch.from_numpy(np.concatenate(ids)) if ids else None)


def deliver(
    source: PoolSource, state: LoaderState, batch_size: int, epochs: int | None, share: Share = WHOLE
) -> Generator[Batch, None, None]:
    """A share of the batches from a state on, as they are stored, decoded where that is codes, by hook point."""
    ranges = share.ranges(batch_size)
    on_host = not source.staged
    planned = source.pools(state.epoch, state.cursor, epochs, batch_size)
    with _copy_threads(source.device) as threads, closing(Prefetch(planned, depth=1)) as pools:

        def begin(pool: Pool, lo: int, hi: int) -> Callable[[], Taken]:
            taken = source.take(pool, lo, hi)
            return threads.submit(taken).result if on_host else taken

        begun = _cut(pools, state, batch_size, source.order.n_rows, begin, ranges)
        yield from _in_order(begun, BATCHES_AHEAD * on_host)


@contextmanager
def _copy_threads(device: torch.device) -> Iterator[Executor]:
    """A loader may be collected in any of its threads, and a thread cannot wait for itself."""
    executor = ThreadPoolExecutor(n_copy_threads(device), thread_name_prefix=THREADS + "copy")
    try:
        yield executor
    finally:
        executor.shutdown(wait=not in_background(), cancel_futures=True)


def _cut(
    pools: Iterator[Pool],
    state: LoaderState,
    batch_size: int,
    n_rows: int,
    begin: Callable[[Pool, int, int], Callable[[], Taken]],
    ranges: Sequence[tuple[int, int]],
) -> Iterator[_Begun]:
    """The rows in `ranges` of batches of the survivors of consecutive pools; `n_rows` is the length of an epoch."""
    pool: Pool | None = None
    taken = 0  # survivors of the pool that were handed out
    while True:
        pieces: list[Callable[[], Taken]] = []
        missing = batch_size
        while missing:
            if pool is None:
                pool = next(pools, None)
                if pool is None:
                    break
                taken = pool.survivors_before(state.cursor if pool.epoch == state.epoch else 0)
            n = min(missing, len(pool.order) - taken)
            offset = taken - (batch_size - missing)  # from a place in the batch to one among the pool's survivors
            for lo, hi in ranges:
                if (first := max(lo + offset, taken)) < (end := min(hi + offset, taken + n)):
                    pieces.append(begin(pool, first, end))
            taken, missing = taken + n, missing - n
            if taken < len(pool.order):
                state = LoaderState(state.seed, pool.epoch, pool.cursor_after(taken))
                continue
            stop = pool.start + pool.n_rows
            state = LoaderState(state.seed, pool.epoch + (stop == n_rows), 0 if stop == n_rows else stop)
            pool.rows.release()
            pool = None
        if not pieces:
            return
        yield _Begun(pieces, state)


def _in_order(begun: Iterator[_Begun], ahead: int) -> Iterator[Batch]:
    """Finished batches, with `ahead` more begun; an error of beginning one comes after the batches before it."""
    waiting: deque[_Begun] = deque()
    failed: Exception | None = None
    while True:
        try:
            batch = next(begun, None)
        except Exception as error:
            batch, failed = None, error
        if batch is None:
            break
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.popleft().finish()
    while waiting:
        yield waiting.popleft().finish()
    if failed is not None:
        raise failed


def _join(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
