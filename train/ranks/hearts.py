"""Signs of life: each rank beats in the store every half second, and listens for the others."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress

from torch._C._distributed_c10d import Store

from sae_granary.train.errors import RankError
from sae_granary.train.ranks.place import Place

BEAT = 0.5  # seconds
GRACE = 5.0  # seconds, beyond the timeout, in which a rank that waits for a text ends by itself


def gone(who: str) -> str:
    """The message about those that are gone, with the remedy."""
    return f"{who}; start the ranks again to continue from the last checkpoint (`run` with --resume auto)"


class Hearts:
    """Two threads: one beats for this rank and listens for the others, one watches.

    Where the host of the store is gone, or the network to it, a call to the store may not return. So the second thread
    only compares times. They are those of a clock that stands still while this process, or its machine, is stopped:
    the others are silent then only for this process.
    """

    def __init__(self, place: Place, store: Store) -> None:
        self._place, self._store = place, store
        self._now = 0.0  # seconds
        self._seen = {i: (b"", self._now) for i in range(place.n) if i != place.index}
        self._answered = self._now  # when the store did last
        self._names: dict[int, str] = {}
        self.watches = False  # whether this process ends when others are unheard for too long
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"granary-{target.__name__.strip('_')}", daemon=True)
            for target in (self._beat, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def unheard(self, seconds: float) -> str:
        """Who has given no sign of life for so long; empty if all have.

        Without the store nobody is heard: then that is what is named, since the others may be well.
        """
        now = self._now
        if now - self._answered > seconds:
            at = f"rank 0 ({self._where(0)}) at {self._place.address}:{self._place.port}"
            return f"{at} is gone, or cannot be reached from {socket.gethostname()}"
        silent = [i for i, (_, since) in sorted(self._seen.items()) if now - since > seconds]
        return ", ".join(f"rank {i} ({self._where(i)})" for i in silent) + " is gone" if silent else ""

    def stop(self) -> None:
        """End the threads; one that waits for the store is left alone."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * BEAT)

    def _where(self, index: int) -> str:
        """Host and process of a rank."""
        return self._names.get(index, "unknown host")

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(BEAT):
            passed, before = time.monotonic() - before, time.monotonic()
            self._now += min(passed, 2 * BEAT)
            if self.watches and (who := self.unheard(self._place.timeout + GRACE)):
                os.write(2, f"error: {gone(who)}; no answer for {self._place.timeout:g} s\n".encode())
                os._exit(RankError.exit_code)

    def _beat(self) -> None:
        count = 0
        with suppress(RuntimeError):
            self._names = {i: json.loads(self._store.get(f"here/{i}")) for i in range(self._place.n)}
        while not self._stop.wait(BEAT):
            count += 1
            with suppress(RuntimeError):  # the host of the store is gone, or the network
                self._store.set(f"beat/{self._place.index}", str(count))
                for i, (last, _) in list(self._seen.items()):
                    if self._store.check([f"beat/{i}"]) and (found := self._store.get(f"beat/{i}")) != last:
                        self._seen[i] = (found, self._now)
                self._answered = self._now
