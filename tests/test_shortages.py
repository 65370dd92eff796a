"""A full disk, a limit of open files, a shard that is truncated while it is read: what is said, and what is kept."""

import errno
import gc
import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from command_kit import run_python
from conftest import write_cache

from sae_granary import open_cache, resume_sweep, resume_training, train_sae, train_sweep
from sae_granary.cache.errors import CacheError, CorruptCacheError
from sae_granary.common.files import shortage
from sae_granary.common.process import allow_open_files, open_files_left
from sae_granary.train.callbacks import StepEvent
from sae_granary.train.errors import ShortageError
from sae_granary.train.sweeps import execution
from sae_granary.train.sweeps.reporter import Reporter

SETTINGS = {"type": "topk", "d_sae": 24, "batch_size": 64, "steps": 5, "save_every": 2, "eval_rows": 200}
FULL = r"no space left for .*: up to [\d.]+ KiB needed, [\d.]+ [KMGTP]?i?B free"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return {**SETTINGS, "cache": str(write_cache(tmp_path_factory.mktemp("s") / "toy", n_docs=20, d_in=8))}


@contextmanager
def full_after(n_writes: int) -> Iterator[None]:
    """The disk takes so many more files, then none: as a file system says it that allocates late."""
    left, sync = n_writes, os.fsync

    def synced(fd: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        yield


@contextmanager
def open_files(n_more: int) -> Iterator[None]:
    """About so many more open files, or none: the limit is on numbers, so those that are free below it are taken."""
    gc.collect()  # what is closed meanwhile would make room
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = open_files_left()
    assert left is not None
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] - left + n_more, before[1]))
    try:
        with suppress(OSError):
            while not n_more:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in taken:
            os.close(descriptor)


def test_a_full_disk_is_named_and_training_continues(settings, tmp_path) -> None:
    whole = train_sae(**settings, k=2, runs_dir=str(tmp_path / "whole")).folder
    for n_writes in (5, 14, 30):
        runs = tmp_path / str(n_writes)
        with (
            full_after(n_writes),
            pytest.raises(ShortageError, match=f"{FULL}; fix this, then run: sae-train resume") as e,
        ):
            train_sae(**settings, k=2, runs_dir=str(runs))
        folder = resume_training(next(runs.iterdir())).folder
        assert str(folder) in str(e.value)
        assert (folder / "sae_weights.safetensors").read_bytes() == (whole / "sae_weights.safetensors").read_bytes()


def test_a_full_disk_is_named_in_a_sweep(settings, tmp_path) -> None:
    with full_after(3), pytest.raises(ShortageError, match=FULL):
        train_sweep({"k": [1, 2]}, settings, runs_dir=str(tmp_path / "a"))
    ended: list[str] = []
    reporter = Reporter()
    reporter.ended = lambda name, how: ended.append(how)  # type: ignore[method-assign]
    with full_after(40), pytest.raises(ShortageError, match=FULL):
        train_sweep({"k": [1, 2]}, settings, runs_dir=str(tmp_path / "b"), reporter=reporter)
    assert len(ended) == 2
    assert all(re.search(FULL, how) for how in ended), ended
    assert resume_sweep(next((tmp_path / "b").iterdir())).failures == {}


def test_a_sweep_fits_the_limit_of_open_files(settings, tmp_path) -> None:
    grid = {"k": [1, 2], "init_seed": [0, 1, 2]}
    free = train_sweep(grid, settings, runs_dir=str(tmp_path / "free")).folder
    said: list[str] = []
    reporter = Reporter()
    reporter.message = said.append  # type: ignore[method-assign]
    with open_files(execution.OTHER_FILES + 3):
        tight = train_sweep(grid, settings, runs_dir=str(tmp_path / "tight"), reporter=reporter)
    assert tight.failures == {}
    assert said == ["2 of 6 SAEs train at once: the limit of open files (ulimit -n)"]
    for row in tight.rows:
        name = f"{row['name']}/sae_weights.safetensors"
        assert (tight.folder / name).read_bytes() == (free / name).read_bytes()
    with open_files(20), pytest.raises(ShortageError, match=r"about 38 open files needed, \d+ free: raise the limit"):
        train_sweep(grid, settings, runs_dir=str(tmp_path / "none"))


@pytest.mark.slow
def test_a_sweep_opens_few_files_per_sae(settings, tmp_path) -> None:
    def most_open(n: int) -> int:
        left: list[int] = []

        def count(event: StepEvent) -> None:
            left.append(open_files_left() or 0)

        before = open_files_left() or 0
        grid = {"init_seed": list(range(n)), "k": [2]}
        train_sweep(grid, settings, runs_dir=str(tmp_path / str(n)), callbacks=lambda config: [count])
        return before - min(left)

    assert most_open(8) - most_open(2) <= 8  # a lock each, and what a moment's checkpoint opens


def test_a_shard_that_no_descriptor_is_left_for_is_no_damage(settings) -> None:
    opened = open_cache(settings["cache"])
    with open_files(0), pytest.raises(CacheError, match=r"no file descriptor left for .*: raise the limit") as caught:
        opened.hook()[0]
    assert not isinstance(caught.value, CorruptCacheError)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 512), before[1]))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(before[1], 1 << 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert shortage(OSError(errno.EACCES, "no"), Path("x")) is None


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no bus errors here")
def test_a_shard_truncated_while_mapped_is_named_before_the_process_dies(settings, tmp_path) -> None:
    code = f"""
import os, threading
from sae_granary import open_cache
from sae_granary.cache.read.arrays import truncated_shards
from sae_granary.common.signals import explain_bus_errors
explain_bus_errors(truncated_shards)
rows = open_cache({settings["cache"]!r}).hook()
rows[0]
path = rows.path(0)
data = path.read_bytes()
os.truncate(path, 0)
thread = threading.Thread(target=lambda: print(rows[0:5].sum()))
pid = os.fork()
if pid:
    status = os.waitpid(pid, 0)[1]
    path.write_bytes(data)
    raise SystemExit(os.waitstatus_to_exitcode(status) % 256)
thread.start()
thread.join()
"""
    done = run_python(code, code=256 - signal.SIGBUS)
    where = re.escape(f"{settings['cache']}/activations/")
    told = rf"error: {where}[^/]*/c\.0\.0 was truncated while it was read: 0 bytes are left of [\d,]+; restore it"
    assert re.search(told, done.stderr)
