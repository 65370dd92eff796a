"""Children that are killed while a cache is extended, added to or repaired, and others that run the same again.

`main` runs in an interpreter of its own that imports everything and starts no thread: its forks are then as good as
fresh interpreters, and each takes well under a second.
"""

import contextlib
import faulthandler
import importlib
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401
from cache_kit import contents, flip
from test_train_resume import assert_same

import sae_granary.models.pooled  # noqa: F401
from sae_granary import open_cache, resume_training
from sae_granary.cache.errors import IncompleteCacheError
from sae_granary.cache.read.verify import verify
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.harvest.replay.damage import find_damage
from sae_granary.harvest.replay.repair import repair
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import WhereConfig

RENAMES = ("link", "rename", "replace")
CALLS = (*RENAMES, "unlink", "mkdir", "rmdir")  # each changes a name
HANGS_SECONDS = 200
DAMAGED = (
    "activations/layer_1/c.0.0", "norms/layer_1/c.1", "commits/00000001.json", "rows/zarr.json", "vocabulary.json",
    "documents/00000000.parquet", "added/layer_2/activations/layer_2/c.1.0",
)  # fmt: skip


@dataclass
class Growth:
    """What happens to the cache of a config, again and again from the state `before`."""

    what: str  # extend, add, repair, or join: blocks become a cache
    config: HarvestConfig  # of the cache; its `max_tokens` is what an extension goes on to
    root: Path  # holds `before`

    @property
    def path(self) -> Path:
        return self.config.out_path

    def start(self) -> None:
        """The cache as it was before."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.root / "before", self.path)

    def act(self) -> None:
        if self.what in ("extend", "join"):
            harvest_activations(replace(self.config, extend=self.what == "extend"), quiet=True)
        elif self.what == "add":
            add_hooks(self.path, WhereConfig(layers=(2,)), quiet=True)
        else:
            repair(self.path, quiet=True)

    def look(self, states: dict[str, Any]) -> None:
        """Readers find the cache as it was or as it will be; a file of a repair is the damaged or the whole one."""
        if self.what == "repair":
            now = contents(self.path)
            for name, data in states["after"].items():
                assert now.get(name) in (data, states["before"].get(name)), name
            assert find_damage(self.path) or now.items() >= states["after"].items()
            return
        if self.what == "join":
            with contextlib.suppress(IncompleteCacheError):
                assert verify(open_cache(self.path).path).ok
            return
        cache = open_cache(self.path)
        seen = (cache.n_rows, tuple(cache.hook_points))
        assert seen in states["seen"], seen
        assert verify(self.path).ok, verify(self.path).problems
        for hook in cache.hook_points:
            assert len(cache.hook(hook)[:]) == cache.n_rows == cache.stats(hook).n_rows
        growing = open_cache(self.path, allow_incomplete=True)
        assert len(growing.hook()[:]) == growing.n_rows == growing.stats().n_rows


def damage(path: Path) -> None:
    """Missing, truncated and flipped files of every kind."""
    for name in DAMAGED:
        flip(path / name, 5)
    (path / "rows/doc_id/c.0").unlink()
    os.truncate(path / "rows/flags/c.1", 10)


def seen_of(path: Path) -> tuple[int, tuple[str, ...]]:
    cache = open_cache(path)
    return cache.n_rows, tuple(cache.hook_points)


class Armed:
    """Lists the calls that change names from now on; something happens before the n-th, or it dies after a time."""

    def __init__(self, n: int | None, seconds: float | None, happens: Callable[[], None]) -> None:
        self.calls: list[str] = []
        self._n, self._seconds, self._happens, self.begun = n, seconds, happens, 0.0
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) == 1:
                self.begun = processor_seconds()
                if self._seconds is not None:  # of the processor; the signal has no handler, so that it kills
                    signal.setitimer(signal.ITIMER_PROF, self._seconds)
            if len(self.calls) == self._n:
                self._happens()
            return real(*args, **kwargs)

        return call


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def child(run: Callable[[], Any]) -> Any:
    """What `run` returns in a fork, or the exit code of one that was killed."""
    return ended(begun(run))


def begun(run: Callable[[], Any]) -> tuple[int, int]:
    """The process of a fork that runs `run`, and the pipe of what that returns."""
    until = time.monotonic() + HANGS_SECONDS
    while others := other_threads():  # one that was joined takes a moment to end
        assert time.monotonic() < until, others
        time.sleep(0.001)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
            os.write(write, pickle.dumps(run()))
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(write)
    return pid, read


def other_threads() -> list[str]:
    """Threads beside this one that do not survive a fork; jemalloc's has handlers for it."""
    found = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            found.append((int(task), Path(f"/proc/self/task/{task}/comm").read_text().strip()))
    return [name for task, name in found if task != os.getpid() and name != "jemalloc_bg_thd"]


def ended(process: tuple[int, int]) -> Any:
    """What it returned, or its exit code where it was killed."""
    pid, read = process
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL, -signal.SIGPROF), code
    return pickle.loads(data) if code == 0 else code


def count_of(growth: Growth) -> tuple[list[str], float]:
    """Calls that change names in an uninterrupted one, and processor seconds from the first of them on."""
    armed = Armed(None, None, die)
    growth.act()
    return armed.calls, processor_seconds() - armed.begun


def import_all(growth: Growth) -> None:
    """Import what it imports, so that no fork has to."""
    for name in child(lambda: modules_of(growth)):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    growth.start()


def modules_of(growth: Growth) -> list[str]:
    """Everything that it imports."""
    growth.act()
    growth.look({"seen": {seen_of(growth.path)}, "after": {}})
    return list(sys.modules)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(HANGS_SECONDS)  # of another thread than the one that dies first


def kill(growth: Growth, n: int | None, seconds: float | None) -> None:
    Armed(n, seconds, die)
    growth.act()


def continue_it(growth: Growth, states: dict[str, Any], run: Path | None) -> int:
    """What readers see, then the same command once more: the bytes of an uninterrupted one. 1 if a kill left traces."""
    growth.look(states)
    if run is not None:
        shutil.copytree(run / "stopped", copy := run / "copy")
        assert_same(resume_training(copy).folder, run / "whole")
        shutil.rmtree(copy)
    traces = (growth.path / ".tmp").exists() or any(growth.path.glob("added/*/.tmp"))
    growth.act()
    found = contents(growth.path)
    assert found.keys() == states["after"].keys(), found.keys() ^ states["after"].keys()
    assert [name for name in found if found[name] != states["after"][name]] == []
    return int(traces)


def points_of(what: str, calls: list[str], every: int) -> list[int]:
    """Before every rename and every n-th other call; 0: only one, amid the files of a shard or after the last."""
    if not every:
        return [len(calls) - 4 if what == "repair" else len(calls) // 2]
    others = [n for n, name in enumerate(calls, 1) if name not in RENAMES]
    return sorted([n for n, name in enumerate(calls, 1) if name in RENAMES] + others[::every])


def main(root: Path, whats: str, every: int | None, n_random: int) -> None:
    """Kill at the points of `points_of`, and at so many random instants."""
    os.fsync = lambda fd: None  # a kill loses no page cache
    config = pickle.loads((root / "config.pickle").read_bytes())
    for what in whats.split(","):
        growth = Growth(what, config, root / what)
        begin = time.monotonic()
        growth.start()
        before = contents(growth.path)
        seen = {child(lambda g=growth: seen_of(g.path))} if what not in ("repair", "join") else set()
        if every != 0 and what == "extend":  # which leaves threads of pyarrow
            import_all(growth)
        elif every != 0:  # so that no fork has to import and prepare what it uses
            growth.act()
            growth.start()
        calls, seconds = child(lambda g=growth: count_of(g))
        states = {"before": before, "after": contents(growth.path)}
        states["seen"] = seen | ({child(lambda g=growth: seen_of(g.path))} if seen else set())
        run = root / "runs" if (root / "runs").exists() and what != "repair" else None
        chance, n_traces = random.Random(what), 0
        points: list[tuple[int | None, float | None]]
        points = [(n, None) for n in points_of(what, calls, every)] if every is not None else []
        points += [(None, chance.uniform(0, seconds)) for _ in range(n_random)]
        for i, (n, after) in enumerate(points):
            growth.start()
            code = child(lambda g=growth, n=n, s=after: kill(g, n, s))
            assert code != 0 or after is not None, (what, n)  # a timer may come too late
            resumed = run if i % 16 == 7 else None
            n_traces += child(lambda g=growth, s=states, r=resumed: continue_it(g, s, r))
        print(what, len(calls), "calls", f"{seconds:.2f} s", len(points), "kills", n_traces, "left traces,",
              f"{time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
        assert n_traces >= len(points) // 3, (what, n_traces)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], None if sys.argv[3] == "none" else int(sys.argv[3]), int(sys.argv[4]))
