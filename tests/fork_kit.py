"""Processes that start in milliseconds: forks of one process that has imported the stages and runs no other thread."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

LIMIT = float(os.environ.get("GRANARY_TEST_LIMIT", "60"))  # seconds; whoever takes longer is killed, and its test fails
PRELOADED = (
    "sae_granary.train.run", "sae_granary.train.cli", "sae_granary.train.ranks.run",
    "sae_granary.train.sweeps.sweep", "sae_granary.train.result.plots", "sae_granary.sae_core.variants.topk",
    "sae_granary.sae_core.variants.batchtopk",
    "sae_granary.harvest.run", "sae_granary.harvest.cli", "transformers.models.bert.modeling_bert",
    "torch.distributed.launcher.api",
)  # fmt: skip


def context() -> Any:
    """The context of multiprocessing whose processes are such forks. All tests share it: it is started once."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(PRELOADED))
    return found


class Forked:
    """A function in a process of its own, whose output goes to a file."""

    def __init__(self, output: Path, function: Callable[..., Any], args: tuple[Any, ...], env: Mapping[str, str]):
        self._output = output
        self._process = context().Process(target=_run, args=(str(output), {**os.environ, **env}, function, args))
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def running(self) -> bool:
        return bool(self._process.exitcode is None)

    @property
    def output(self) -> str:
        """All that it has printed."""
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""

    def send(self, signum: int) -> None:
        """Send a signal."""
        os.kill(self.pid, signum)

    def end(self) -> None:
        """Kill it, if it runs."""
        if self.running:
            self._process.kill()
        self._process.join()

    def code(self, within: float = LIMIT) -> int:
        """Wait for its end: the exit code, or minus the signal that ended it."""
        self._process.join(within)
        if self.running:
            self.end()
            pytest.fail(f"a process had not ended after {within:g} s; it printed\n{self.output}")
        return int(self._process.exitcode)


class Forks:
    """The processes of a test; those that run at its end are killed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._all = folder, list[Forked]()

    def start(self, function: Callable[..., Any], *args: Any, **env: str) -> Forked:
        """Call a function of a module in a new process with these variables of the environment."""
        self._all.append(Forked(self._folder / f"{len(self._all)}.txt", function, args, env))
        return self._all[-1]

    def end(self) -> None:
        """Kill those that run."""
        for process in self._all:
            if process.running:
                process.send(signal.SIGKILL)
        for process in self._all:
            process.end()


@pytest.fixture
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts processes."""
    found = Forks(tmp_path_factory.mktemp("output"))
    try:
        yield found
    finally:
        found.end()


def command(module: str, *args: str) -> None:
    """What `python -m module args` does."""
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def free_port() -> int:
    """A port below those that the system gives to connections, so that nobody takes it in the meantime."""
    while True:
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port := random.SystemRandom().randrange(10_000, 30_000)))
            return port


def wait_until(condition: Callable[[], Any], *, within: float = LIMIT, of: tuple[Forked, ...] = ()) -> Any:
    """Wait for a true value of `condition()`, while the processes `of` which it depends run."""
    until = time.monotonic() + within
    while not (found := condition()):
        assert all(process.running for process in of), [process.output for process in of]
        assert time.monotonic() < until, f"nothing after {within:g} s"
        time.sleep(0.02)
    return found


def last_line(output: str) -> str:
    """The last line of an output, without colors."""
    return re.sub(r"\x1b\[[0-9;]*m", "", output).rstrip().splitlines()[-1]


def _run(output: str, env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    fd = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    os.environ.clear()  # that of the process which all are forked from is of the first test
    os.environ.update(env)
    os.fsync = lambda fd: None  # tests kill processes, not machines
    function(*args)
