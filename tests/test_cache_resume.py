"""Killed at any instant and started again, a harvest ends with the same bytes. Two writers do no damage."""

import errno
import os
import shutil

import numpy as np
import pytest
from cache_kit import harvest, interrupted, toy_buffer, toy_spec, tree
from command_kit import run_python

from sae_granary import open_cache
from sae_granary.cache.errors import (
    CacheExistsError,
    CacheLockedError,
    CacheMismatchError,
    ConcurrentWriteError,
    CorruptCacheError,
    DiskFullError,
)
from sae_granary.cache.format import records
from sae_granary.cache.format.documents import DocumentFile
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write import session
from sae_granary.cache.write.shard import OpenShard
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common import files
from sae_granary.common.lock import FolderLock
from sae_granary.common.rows import DocumentRow, HookPoint

LAYER_1 = toy_spec().hook_points[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a harvest that nothing stops leaves."""
    path = tmp_path_factory.mktemp("whole") / "toy"
    harvest(path)
    return tree(path)


# Each child stops dead at the n-th call that changes a name or syncs, for every n; a second child then continues.
CRASH_POINTS = """
import os, sys
from pathlib import Path
from cache_kit import harvest, toy_spec, tree
from sae_granary.common import files

root, step, offset = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
spec = toy_spec(hooks=("layer_1",), rows_per_shard=96)
real = {name: getattr(os, name) for name in ("link", "unlink", "replace", "fsync", "mkdir")}

def arm(n):
    left = [n]
    def wrap(name, after):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0 and not after:
                os._exit(9)
            result = None if name == "fsync" else real[name](*args, **kwargs)
            if left[0] <= 0:
                os._exit(9)
            return result
        return call
    for k, name in enumerate(real):
        setattr(os, name, wrap(name, after=(n + k) % 2))

def child(run):
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

os.fsync = lambda fd: None
whole = root / "whole"
assert child(lambda: harvest(whole, spec, 4)) == 0
expected = tree(whole)
remains, n = 0, 1 + offset
while True:
    path = root / f"crash_{n}"
    def crash():
        arm(n)
        harvest(path, spec, 4)
    code = child(crash)
    assert code in (0, 9), code
    remains += (path / ".tmp").exists()
    assert child(lambda: harvest(path, spec, 4)) == 0, n
    assert tree(path) == expected, (n, set(tree(path).items()) ^ set(expected.items()))
    if code == 0:
        break
    n += step
assert n > 250, n
assert remains, "no crash left anything: the test shows nothing"
"""


@pytest.mark.parametrize(
    ("step", "offset"), [(29, 0), *(pytest.param(5, offset, marks=pytest.mark.slow) for offset in range(5))]
)
def test_killed_at_every_rename_and_sync_it_continues_to_the_same_bytes(tmp_path, step, offset):
    run_python(CRASH_POINTS, tmp_path, step, offset)


def test_killed_at_random_instants_it_continues_to_the_same_bytes(tmp_path):
    run_python(
        '''
import os, random, signal, sys
from pathlib import Path
from cache_kit import harvest, tree

root, chance = Path(sys.argv[1]), random.Random(0)

os.fsync = lambda fd: None  # a kill loses no page cache

def child(path, seconds=0.0):
    """Exit code and seconds on the processor. After so many of them, not of the clock, the kernel ends the child:
    a parent that kills would fall behind where others load the machine."""
    pid = os.fork()
    if pid == 0:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal has no handler; 0 is no timer
        harvest(path)
        os._exit(0)
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime

code, duration = child(root / "whole")
assert code == 0
expected, killed = tree(root / "whole"), 0
for i in range(5):
    path = root / str(i)
    for _ in range(2):
        code, _ = child(path, chance.uniform(0.01, 0.6) * duration)
        assert code in (0, -signal.SIGPROF), code
        killed += code != 0
    code, _ = child(path)
    assert code == 0, code
    assert tree(path) == expected
assert killed >= 3, killed
''',
        tmp_path,
    )


def test_an_exception_keeps_committed_shards_and_drops_the_open_one(whole, tmp_path):
    path = interrupted(tmp_path / "toy")
    assert not (path / ".tmp").exists()
    assert not (path / ".lock").exists()
    part = open_cache(path, allow_incomplete=True)
    assert len(part.shards) == 1
    assert verify(path).ok
    assert verify(path).foreign == ()
    harvest(path)
    assert tree(path) == whole
    before = tree(path)
    harvest(path)  # a finished harvest run again
    assert tree(path) == before


def test_an_interruption_before_the_first_shard_leaves_nothing(tmp_path):
    assert not interrupted(tmp_path / "toy", after=-1).exists()


def test_without_clearing_uncommitted_files_a_resume_would_stop(whole, tmp_path, monkeypatch):
    path = tmp_path / "toy"
    interrupted(path)
    orphan = path / "activations/layer_1/c.1.0"
    orphan.write_bytes(b"left by a killed writer")
    monkeypatch.setattr(session, "clear_uncommitted", lambda *args: None)
    with pytest.raises(ConcurrentWriteError, match="another process writes the same shard"):
        harvest(path)
    assert orphan.read_bytes() == b"left by a killed writer"
    monkeypatch.undo()
    harvest(path)
    assert tree(path) == whole


def test_data_is_synced_before_names_and_names_before_the_record(tmp_path, monkeypatch):
    events = []
    real_sync, real_link, real_mkdir = os.fsync, os.link, os.mkdir

    def sync(fd):
        events.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))
        real_sync(fd)

    def link(source, target):
        events.append(("link", str(source), str(target)))
        real_link(source, target)

    def mkdir(folder, *args):
        real_mkdir(folder, *args)
        events.append(("mkdir", str(folder)))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "mkdir", mkdir)
    path = tmp_path / "toy"
    harvest(path)
    record = next(i for i, e in enumerate(events) if e[0] == "link" and e[2].endswith("commits/00000001.json"))
    linked = {e[2]: i for i, e in enumerate(events) if e[0] == "link"}
    for name in open_cache(path).records[1].files:
        i = linked[str(path / name)]
        synced = [k for k, e in enumerate(events[:i]) if e == ("sync", events[i][1])]
        assert synced, name
        folder = [k for k, e in enumerate(events) if e == ("sync", str((path / name).parent)) and i < k < record]
        assert folder, name
    assert ("sync", events[record][1]) in events[:record]
    assert events[record + 1] == ("sync", str(path / "commits"))
    commits = [i for i, e in enumerate(events) if e[0] == "link" and "/commits/" in e[2]]
    for folder in [f for f in path.rglob("*") if f.is_dir()]:
        assert ("sync", str(folder.parent)) in events[events.index(("mkdir", str(folder))) : commits[0]], folder
    files = open_cache(path).records[1].files
    n_syncs = sum(e[0] == "sync" for e in events[commits[0] + 2 : commits[1] + 2])
    assert n_syncs == len(files) + len({os.path.dirname(name) for name in files}) + 2  # no more: each one is a wait
    metadata = {("sync", str(file)) for file in path.rglob("zarr.json")}
    assert metadata <= set(events[commits[-1] :])
    assert not metadata & set(events[: commits[-1]])


def test_a_second_writer_is_told_the_pid_and_age(tmp_path):
    path = tmp_path / "toy"
    with (
        CacheWriter.open(path, toy_spec()),
        pytest.raises(CacheLockedError, match=rf"process {os.getpid()}, for [\d.]+ s"),
    ):
        CacheWriter.open(path, toy_spec())
    harvest(path)


def test_a_lock_ends_with_its_process(whole, tmp_path):
    path = tmp_path / "toy"
    code = "import os, sys; from cache_kit import *; CacheWriter.open(sys.argv[1], toy_spec()); os.kill(os.getpid(), 9)"
    run_python(code, path, code=-9)
    assert (path / ".lock").exists()
    harvest(path)
    assert tree(path) == whole


def test_two_writers_without_locks_do_no_damage(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(FolderLock, "acquire", lambda self: None)
    path, spec = tmp_path / "toy", toy_spec()
    with CacheWriter.open(path, spec) as first:
        _append(first, 0)
        # The second one starts its own shard 0; its opening removes the first one's temporary files.
        with CacheWriter.open(path, spec) as second:
            _append(second, 0, 1, 2)
            with pytest.raises(ConcurrentWriteError):
                _append(first, 1, 2, 3)
    assert verify(path).ok
    monkeypatch.undo()
    harvest(path)
    assert tree(path) == whole


def _append(one, *buffers):
    for number in buffers:
        one.begin_buffer({"buffer": number})
        one.append(*toy_buffer(number))


def test_a_shard_that_another_process_committed_is_not_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "toy"
    with CacheWriter.open(path, toy_spec()) as slow:
        _append(slow, 0)
        monkeypatch.setattr(FolderLock, "acquire", lambda self: None)
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # keep the slow one's temporary files
        interrupted(path)
        monkeypatch.undo()
        before = tree(path / "activations")
        with pytest.raises(ConcurrentWriteError, match="another process"):
            _append(slow, 1, 2, 3)
        assert tree(path / "activations") == before
    assert verify(path).ok


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"dtype": "float16"}, "dtype: the cache has 'bfloat16', this command wants 'float16'"),
        ({"unit": "text"}, "unit"),
        ({"rows_per_shard": 128}, "rows_per_shard"),
        ({"hook_points": (LAYER_1,)}, "hook_points"),
        ({"hook_points": (LAYER_1, HookPoint("layer_3", "other", "output", 0, 8))}, "layer_3.module"),
        ({"fingerprint": {"model": "toy", "weights": "4567", "dataset": "toy-text"}}, "weights: the cache has '0123'"),
        ({"fingerprint": {"model": "toy", "weights": "0123"}}, "dataset: the cache has 'toy-text', .* None"),
        ({"vocabulary": ["a"]}, "vocabulary"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_another_harvest_is_refused_field_by_field(tmp_path, complete, change, shown):
    path = tmp_path / "toy"
    if complete:
        harvest(path, n_buffers=2)
    else:
        interrupted(path)
    before = tree(path)
    with pytest.raises(CacheMismatchError, match=shown) as refused:
        CacheWriter.open(path, toy_spec(**change))
    assert f"--out {path}_2" in str(refused.value)
    assert len(refused.value.differences) == 1
    assert tree(path) == before


def test_a_cache_without_rows_gives_way_to_another_harvest(whole, tmp_path):
    path = tmp_path / "toy"
    code = "import os, sys; from cache_kit import *; CacheWriter.open(sys.argv[1], toy_spec('float32')); os._exit(0)"
    run_python(code, path)
    assert (path / "manifest.json").exists()
    harvest(path)
    assert tree(path) == whole


def test_provenance_may_change_on_resume_and_the_first_one_is_kept(tmp_path):
    path = tmp_path / "toy"
    interrupted(path)
    harvest(path, toy_spec(provenance={"model": {"id": "toy"}, "versions": {"torch": "9"}}))
    assert open_cache(path).manifest.provenance == toy_spec().provenance


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CacheExistsError, match=r"holds something that is not a cache \(thesis.tex\)"):
        CacheWriter.open(tmp_path, toy_spec())
    with pytest.raises(CacheExistsError, match="is a file"):
        CacheWriter.open(tmp_path / "thesis.tex", toy_spec())
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(CacheExistsError, match="not an activation cache"):
        CacheWriter.open(tmp_path, toy_spec())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "thesis.tex"]


def test_a_log_beside_an_empty_cache_is_no_obstacle(tmp_path):
    (tmp_path / "harvest.log").write_text("started")
    harvest(tmp_path)
    assert verify(tmp_path).ok
    assert verify(tmp_path).foreign == ()


def test_a_gap_in_the_records_is_damage(tmp_path):
    path = tmp_path / "toy"
    interrupted(path, after=200)
    (path / "commits/00000001.json").unlink()
    with pytest.raises(CorruptCacheError, match=r"commits/00000001.json is missing, though later shards"):
        open_cache(path, allow_incomplete=True)
    with pytest.raises(CorruptCacheError, match="is missing"):
        harvest(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_bytes_and_committed_shards_stay(whole, tmp_path, monkeypatch, code):
    path, real = tmp_path / "toy", os.write
    written = [0]

    def write(fd, data):
        written[0] += len(data)
        if written[0] > 30_000:
            raise OSError(code, os.strerror(code))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(DiskFullError, match=r"[\d,]+ bytes needed for the next shard, [\d,]+ bytes free") as full:
        harvest(path)
    assert full.value.free_bytes > 0
    monkeypatch.undo()
    assert not (path / ".tmp").exists()
    assert len(open_cache(path, allow_incomplete=True).shards) >= 1
    assert verify(path).ok
    harvest(path)
    assert tree(path) == whole


def test_a_file_system_without_hard_links(whole, tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    harvest(tmp_path / "toy")
    assert tree(tmp_path / "toy") == whole
    (tmp_path / "a").write_text("a")
    with pytest.raises(FileExistsError):
        files.link_into_place(tmp_path / "a", tmp_path / "toy")


@pytest.mark.parametrize("umask", [0o002, 0o007, 0o027, 0o077])
def test_files_follow_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        harvest(tmp_path / "toy", n_buffers=3)
    finally:
        os.umask(old)
    for item in (tmp_path / "toy").rglob("*"):
        expected = (0o777 if item.is_dir() else 0o666) & ~umask
        assert item.stat().st_mode & 0o777 == expected, item


def test_a_reader_sees_whole_shards_while_a_harvest_runs(tmp_path):
    path, seen = tmp_path / "toy", []
    expected = np.concatenate([toy_buffer(i)[0].token_id for i in range(6)])

    def look(n_rows):
        if not (path / "commits/00000000.json").exists():
            return
        part = open_cache(path, allow_incomplete=True)
        seen.append(len(part))
        assert len(part) <= n_rows
        assert (part.column("token_id")[:] == expected[: len(part)]).all()
        assert verify(path).ok

    harvest(path, before_append=look)
    assert len(set(seen)) >= 3
    early = open_cache(path, shards=[0, 1])
    assert len(early) == sum(shard.n_rows for shard in early.shards) < len(open_cache(path))


def test_clear_uncommitted_spares_committed_shards(tmp_path):
    path = tmp_path / "toy"
    harvest(path)
    before = tree(path)
    records.clear_uncommitted(path, open_cache(path).layout, 0)
    assert tree(path) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk that is always full")
def test_an_unfinished_document_file_closes_on_a_full_disk(tmp_path):
    file = DocumentFile(tmp_path / "documents")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file._file.fileno())
    os.close(full)
    file.append([DocumentRow(0, "a", 0, "text")])
    file.close()
    assert file._file.closed


def test_the_lock_goes_whatever_else_fails_at_the_end(whole, tmp_path, monkeypatch):
    path = tmp_path / "toy"
    with monkeypatch.context() as patch:
        patch.setattr(OpenShard, "discard", lambda shard: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            interrupted(path)
    harvest(path)  # the same process may go on
    assert tree(path) == whole
