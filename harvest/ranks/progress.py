"""Progress of all processes together, and one log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sae_granary.common.errors import GranaryError
from sae_granary.harvest.progress import Progress, RunLog
from sae_granary.harvest.ranks.board import Board
from sae_granary.harvest.ranks.lease import Lease
from sae_granary.harvest.ranks.world import World

_SHOW_SECONDS = 1.0
_FIRST_BEAT = 1.0  # seconds until a lease tells the first rows of its block
_HUNG = 900.0  # seconds without a batch after which a process no longer renews its lease


class RankLog(RunLog):
    """The harvest's log: lines of all ranks, each with its rank."""

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__(folder)
        self._rank = world.rank

    def write(self, message: str) -> None:
        """One line with the time and the rank."""
        super().write(message if self._rank is None else f"rank {self._rank}: {message}")


class SummedProgress:
    """What all processes have done, shown by one of them."""

    def __init__(self, shown: Progress, board: Board, bytes_of: Callable[[int], int], *, tells: bool) -> None:
        self._shown, self._board, self._bytes_of, self._tells = shown, board, bytes_of, tells
        self._next, self._total = 0.0, 0
        self.say = shown.say

    def begin(self) -> None:
        """Count from the rows that are there."""
        self._board.look()
        self._total = self._board.n_shown()
        if self._tells:
            self._shown.begin(self._total)

    def show(self) -> None:
        """Look at the blocks of all processes, at most once a second."""
        if self._tells and time.monotonic() >= self._next:
            self._next = time.monotonic() + _SHOW_SECONDS
            before, self._total = self._total, self._board.n_shown()
            self._shown.advance(self._total - before, self._bytes_of(self._total))


class BlockProgress(Progress):
    """The progress of one block, told to its lease and shown as the sum over all blocks."""

    def __init__(self, shown: SummedProgress) -> None:
        self._shown = shown
        self.n_rows = 0
        self.batches = 0

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._shown.say(message)

    def begin(self, done: int) -> None:
        """Rows of the block that are there already."""
        self.n_rows = done

    def advance(self, n_rows: int, bytes_written: int) -> None:
        """n more rows of the block went through the model."""
        self.n_rows += n_rows
        self.batches += 1
        self._shown.show()


class Heartbeat:
    """A thread that renews a lease while its work is done: of a block, only while batches are.

    At first it does so often: others show the rows of the block soon. It also looks at the board: the block may no
    longer be wanted.
    """

    def __init__(self, lease: Lease, board: Board, progress: BlockProgress | None) -> None:
        self._lease, self._board, self._progress, self._longest = lease, board, progress, lease.seconds / 6
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        batches, idle, pause = -1, 0.0, 0.0
        while not self._stop.wait(pause := min(2 * pause or _FIRST_BEAT, self._longest)):
            if self._progress is None:
                self._lease.renew(0)
                continue
            idle = 0.0 if self._progress.batches != batches else idle + pause
            batches = self._progress.batches
            if idle < _HUNG:
                self._lease.renew(self._progress.n_rows)
            with contextlib.suppress(OSError, GranaryError):  # the main thread looks again, and raises it
                self._board.look()
