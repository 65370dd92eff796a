"""Files of chunks: the same bytes past the page cache and through it, whatever the file system takes."""

import errno
import fcntl
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from cache_kit import begins_in_memory, tree

from benchmarks.harvest_speed import random_rows
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.write.chunk_file import ChunkFile, page_aligned
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.rows import HookPoint
from sae_granary.harvest.run import harvest_activations

PAGE = mmap.PAGESIZE


@pytest.fixture(autouse=True, scope="module")
def no_sync():
    """Here files are synced: only then is a page out of memory when it is told to go."""


@pytest.fixture
def syncer():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def assert_holds(file: ChunkFile, expected: bytes) -> None:
    entry = file.finish()
    assert file.path.read_bytes() == expected
    assert (entry.n_bytes, entry.xxh3) == (len(expected), xxhash.xxh3_128(expected).hexdigest())


def skip_unless_direct(folder) -> None:
    """Skip on a file system that has no direct writing, or no disk below it."""
    path = folder / "probe"
    path.write_bytes(bytes(PAGE))
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not begins_in_memory(path):
            return
    except (OSError, AttributeError):
        pass
    pytest.skip("this file system has no direct writing")


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("sizes", [[4 * PAGE, 4 * PAGE, 100], [100, 4 * PAGE], [4 * PAGE], [1, 2, 3], []])
def test_what_is_written_is_there_and_hashed(tmp_path, syncer, direct, sizes) -> None:
    data = page_aligned(np.random.default_rng(0).integers(0, 256, 10 * PAGE, dtype=np.uint8))
    file, expected = ChunkFile(tmp_path / "chunks", syncer, direct=direct), b""
    for size in sizes:
        file.write(data[:size].data)
        expected += data[:size].tobytes()
    assert_holds(file, expected)


def test_memory_that_the_disk_refuses_is_written_all_the_same(tmp_path, syncer) -> None:
    data = page_aligned(np.arange(5 * PAGE // 8))
    crooked = data.view(np.uint8)[1 : 1 + 2 * PAGE]  # no address that a disk takes
    file = ChunkFile(tmp_path / "chunks", syncer, direct=True)
    file.write(data[: PAGE // 8].data)
    file.write(crooked.data)
    file.write(data.data)
    assert_holds(file, data[: PAGE // 8].tobytes() + crooked.tobytes() + data.tobytes())


@pytest.mark.parametrize("at_once", [PAGE, 512, 1])
def test_a_disk_may_take_fewer_bytes_at_once(tmp_path, syncer, monkeypatch, at_once) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:at_once] if len(data) > 2 * PAGE else data))
    data = page_aligned(np.random.default_rng(0).integers(0, 256, 8 * PAGE, dtype=np.uint8))
    file = ChunkFile(tmp_path / "chunks", syncer, direct=True)
    file.write(data.data)
    file.write(data.data)
    monkeypatch.undo()
    assert_holds(file, data.tobytes() * 2)


@pytest.mark.parametrize(("code", "fatal"), [(errno.EOPNOTSUPP, False), (errno.EINVAL, False), (errno.EIO, True)])
def test_only_a_refusal_of_direct_writing_is_got_over(tmp_path, syncer, monkeypatch, code, fatal) -> None:
    write, failures = os.write, iter([code])

    def refuse_once(fd, data):
        if failed := next(failures, None):
            raise OSError(failed, os.strerror(failed))
        return write(fd, data)

    monkeypatch.setattr("sae_granary.cache.write.chunk_file._set_direct", lambda fd, direct: direct)  # any file system
    monkeypatch.setattr(os, "write", refuse_once)
    file, data = ChunkFile(tmp_path / "chunks", syncer, direct=True), bytes(PAGE)
    if fatal:
        with pytest.raises(OSError, match=os.strerror(code)):
            file.write(data)
        file.close()
    else:
        file.write(data)
        assert_holds(file, data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_is_the_same_past_the_page_cache(tmp_path, dtype) -> None:
    rows = random_rows(3000, 256)
    spec = CacheSpec(
        "token",
        (HookPoint("layer_6", "encoder.layer.6", "output", 0, 256),),
        dtype,
        2048,
        provenance={},
        fingerprint={},
    )
    for direct in (False, True):
        with CacheWriter.open(tmp_path / str(direct), spec, direct=direct) as writer:
            writer.begin_buffer({})
            for start in range(0, 3000, 640):  # whole windows of 128 rows
                writer.append(rows[start : start + 640])
            writer.finish({})
    assert tree(tmp_path / "False") == tree(tmp_path / "True")


def test_whole_pages_go_past_the_page_cache_where_the_file_system_can(tmp_path, syncer) -> None:
    skip_unless_direct(tmp_path)
    pages, end = page_aligned(np.zeros(4 * PAGE, np.uint8)), b"index"
    file = ChunkFile(tmp_path / "chunks", syncer, direct=True)
    file.write(pages.data)
    assert fcntl.fcntl(file._fd, fcntl.F_GETFL) & os.O_DIRECT
    file.write(end)
    assert not fcntl.fcntl(file._fd, fcntl.F_GETFL) & os.O_DIRECT
    file.finish()


def test_a_harvest_on_a_cpu_leaves_its_rows_out_of_the_page_cache(tmp_path) -> None:
    skip_unless_direct(tmp_path)
    out = tmp_path / "cache"
    harvest_activations(model="demo", dataset="demo", layers=0, max_tokens=2000, out=out, device="cpu", quiet=True)
    path = next((out / "activations").glob("*/c.0.0"))
    assert not begins_in_memory(path)
    path.read_bytes()
    assert begins_in_memory(path)
