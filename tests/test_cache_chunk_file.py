"""Files of chunks: the same bytes past the page cache and through it, whatever the file system takes."""

import fcntl
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from cache_kit import tree

from benchmarks.harvest_speed import random_rows
from cache.chunk_file import ChunkFile, page_aligned
from cache.rows import CacheSpec, HookPoint
from cache.writer import CacheWriter

PAGE = mmap.PAGESIZE


@pytest.fixture
def syncer():
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("sizes", [[4 * PAGE, 4 * PAGE, 100], [100, 4 * PAGE], [4 * PAGE], [1, 2, 3], []])
def test_what_is_written_is_there_and_hashed(tmp_path, syncer, direct, sizes) -> None:
    data = page_aligned(np.random.default_rng(0).integers(0, 256, 10 * PAGE, dtype=np.uint8))
    file, expected = ChunkFile(tmp_path / "chunks", syncer, direct=direct), b""
    for size in sizes:
        file.write(data[:size].data)
        expected += data[:size].tobytes()
    entry = file.finish()
    assert (tmp_path / "chunks").read_bytes() == expected
    assert (entry.n_bytes, entry.xxh3) == (len(expected), xxhash.xxh3_128(expected).hexdigest())


def test_memory_that_the_disk_refuses_is_written_all_the_same(tmp_path, syncer) -> None:
    data = page_aligned(np.arange(5 * PAGE // 8))
    crooked = data.view(np.uint8)[1 : 1 + 2 * PAGE]  # no address that a disk takes
    file = ChunkFile(tmp_path / "chunks", syncer, direct=True)
    file.write(data[: PAGE // 8].data)
    file.write(crooked.data)
    file.write(data.data)
    file.finish()
    expected = data[: PAGE // 8].tobytes() + crooked.tobytes() + data.tobytes()
    assert (tmp_path / "chunks").read_bytes() == expected


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
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except (OSError, AttributeError):
        pytest.skip("this file system writes through the page cache only")
    pages, end = page_aligned(np.zeros(4 * PAGE, np.uint8)), b"index"
    file = ChunkFile(tmp_path / "chunks", syncer, direct=True)
    file.write(pages.data)
    assert fcntl.fcntl(file._fd, fcntl.F_GETFL) & os.O_DIRECT
    file.write(end)
    assert not fcntl.fcntl(file._fd, fcntl.F_GETFL) & os.O_DIRECT
    file.finish()
