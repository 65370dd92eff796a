"""Two processes that grow one cache at once: one waits at a change of a name while the other runs.

`main` runs in an interpreter of its own, as that of `kill_kit`.
"""

import os
import pickle
import re
import sys
import time
from pathlib import Path

from cache_kit import contents
from kill_kit import HANGS_SECONDS, Armed, Growth, begun, child, count_of, ended, import_all

from sae_granary.cache.read.verify import verify
from sae_granary.common.errors import GranaryError
from sae_granary.common.lock import FolderLock


def told(growth: Growth, n: int | None, *, lock: bool) -> str:
    """Grow the cache, waiting before the n-th call that changes a name; the error that it ends with."""

    def wait() -> None:
        Path(growth.root / "waits").touch()
        deadline = time.monotonic() + HANGS_SECONDS / 2
        while not (growth.root / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    if not lock:
        FolderLock.acquire = lambda self: None  # as on a file system where locks do nothing
    Armed(n, None, wait)
    try:
        growth.act()
    except GranaryError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def together(first: Growth, second: Growth, n: int, *, lock: bool) -> tuple[str, str, int]:
    """What the two ended with, and the pid of the first."""
    first.start()
    for name in ("waits", "go"):
        (first.root / name).unlink(missing_ok=True)
    process = begun(lambda: told(first, n, lock=lock))
    deadline = time.monotonic() + HANGS_SECONDS
    while not (first.root / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    of_second = child(lambda: told(second, None, lock=lock))
    (first.root / "go").touch()
    return ended(process), of_second, process[0]


def main(root: Path, firsts: str, seconds: str, step: int) -> None:
    """With the lock the second one is refused; without it no interleaving does damage. Then both are run again."""
    os.fsync = lambda fd: None
    config = pickle.loads((root / "config.pickle").read_bytes())
    for names in zip(firsts.split(","), seconds.split(","), strict=True):
        first, second = (Growth(what, config, root / "add") for what in names)
        first.start()
        if names[0] == firsts.split(",")[0]:
            import_all(first)
        calls, _ = child(lambda f=first: count_of(f))
        wants, n_stopped = [], 0
        for order in ((first, second, first), (second, first, second)):  # as one after the other, until both are done
            first.start()
            for growth in order:
                child(growth.act)
            wants.append(contents(first.path))
        of_first, of_second, pid = together(first, second, len(calls) // 2, lock=True)
        assert of_first == "", of_first
        assert re.search(rf"CacheLockedError: .* process {pid}, for [\d.]+ ", of_second), of_second
        points = range(2, len(calls), step) if step else [len(calls) // 2]
        for n in points:
            ends = together(first, second, n, lock=False)[:2]
            assert child(lambda f=first: verify(f.path).ok), (names, n, ends)
            n_stopped += any(ends)
            for growth in (first, second):
                child(growth.act)
            found = contents(first.path)
            different = [{name for name in {**found, **want} if found.get(name) != want.get(name)} for want in wants]
            assert set() in different, (names, n, ends, different)
        print(*names, len(points), "times without lock,", n_stopped, "times one stopped", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
