"""A cache with many rows: opened and read without counting them first; a run's count is kept for the next run."""

import json
import os
import re
import shutil
import time
from dataclasses import replace

import pytest
import torch
from command_kit import run_python

from benchmarks.sparse_cache import write_sparse_cache
from sae_granary import open_cache
from sae_granary.cache.errors import CorruptCacheError, MissingFileError, SelectionError
from sae_granary.cache.format import signed
from sae_granary.cache.format.layout import MANIFEST
from sae_granary.cache.format.parse import LazyRecords
from sae_granary.cache.load import loader as loaders
from sae_granary.cache.load import pools, readahead
from sae_granary.cache.load.loader import Loader, Shuffle
from sae_granary.cache.load.selection import Filters, Holdout, Selection, account
from sae_granary.cache.read import arrays, check
from sae_granary.cache.write import calibrate
from sae_granary.common import threads
from sae_granary.train.data import counts as counting
from sae_granary.train.data.counts import counted

SELECTION = Selection(holdout=Holdout(0.25))


def rows_of(loader: Loader, n: int = 30) -> torch.Tensor:
    return torch.cat([next(loader).x for _ in range(n)])


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_a_loader_that_has_not_counted_every_row_delivers_the_same(make_cache, monkeypatch, part) -> None:
    opened = open_cache(make_cache(n_docs=300, rows_per_shard=512))
    options = {"batch_size": 16, "order": Shuffle(pool_rows=200), "selection": replace(SELECTION, part=part)}
    with Loader(opened, **options) as loader:
        known, expected = loader.counts, rows_of(loader)
    monkeypatch.setattr(loaders, "COUNTED_ROWS", 100)
    with Loader(opened, **options) as loader:
        assert loader._counts.total < opened.n_rows
        assert torch.equal(rows_of(loader), expected)
        assert loader.counts == known
        assert loader.n_rows == known.of(part)


def test_too_few_rows_are_still_refused_at_once(make_cache, monkeypatch) -> None:
    monkeypatch.setattr(loaders, "COUNTED_ROWS", 10)
    opened = open_cache(make_cache())
    with pytest.raises(SelectionError, match=f"larger than the 0 train rows of the cache .of {opened.n_rows:,}"):
        Loader(opened, batch_size=4, selection=Selection(Filters(min_norm=1e9)))


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The folder of kept counts; every count is kept."""
    monkeypatch.setattr(counting, "KEPT_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sae-granary" / "counts"


def test_a_count_is_kept_for_the_next_run(make_cache, kept, monkeypatch) -> None:
    path = make_cache()
    opened, before = open_cache(path), sorted(path.rglob("*"))
    first = counted(opened, SELECTION, ["layer_6"])
    assert first == account(opened, SELECTION, ["layer_6"])
    assert len(list(kept.iterdir())) == 1
    assert sorted(path.rglob("*")) == before
    monkeypatch.setattr(counting, "account", lambda *a: pytest.fail("it was counted"))
    assert counted(open_cache(path), SELECTION, ["layer_6"]) == first


def test_a_count_of_other_filters_shards_or_contents_is_not_used(make_cache, kept, tmp_path) -> None:
    opened = open_cache(make_cache(n_docs=100, rows_per_shard=256))
    wanted = account(opened, SELECTION, [])
    counted(opened, SELECTION, [])
    others = replace(SELECTION, filters=Filters(special=True))
    assert counted(opened, others, []) == account(opened, others, []) != wanted
    one = open_cache(opened.path, shards=[0])
    assert counted(one, SELECTION, []) == account(one, SELECTION, []) != wanted
    assert len(list(kept.iterdir())) == 3
    record = opened.records[0]
    flags = opened.layout.columns["flags"].shard_path(0)
    files = {**record.files, flags: replace(record.files[flags], xxh3="0" * 32)}
    opened.records = (replace(record, files=files), *opened.records[1:])  # the same rows, another column of flags
    counted(opened, SELECTION, [])
    assert len(list(kept.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]"])
def test_a_damaged_count_is_made_again(make_cache, kept, damage) -> None:
    opened = open_cache(make_cache())
    wanted = counted(opened, SELECTION, [])
    file = next(kept.iterdir())
    whole = file.read_bytes()
    file.write_bytes(damage or whole[:-10])
    assert counted(opened, SELECTION, []) == wanted
    assert file.read_bytes() == whole


def test_a_home_that_cannot_be_written_to_only_costs_the_count(make_cache, kept, tmp_path) -> None:
    (tmp_path / "home").write_text("a file where a folder would be")
    opened = open_cache(make_cache())
    assert counted(opened, SELECTION, []) == account(opened, SELECTION, [])


def test_the_progress_of_a_count_is_shown(make_cache, kept, monkeypatch) -> None:
    monkeypatch.setattr(threads, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(threads, "MORE_SECONDS", 0.001)
    opened, lines = open_cache(make_cache()), []

    def slow(cache, selection, hooks, progress):
        counts = account(cache, selection, hooks, lambda share: progress(share / 2))
        while not any("%" in line for line in lines):
            time.sleep(0.001)  # until the other thread has told it
        return counts

    monkeypatch.setattr(counting, "account", slow)
    with threads.shown(lines.append):
        counted(opened, SELECTION, [])
    assert re.match(rf"counting the {opened.n_rows:,} rows of {opened.path}: \d+%, ", lines[-1])


def test_many_shards_in_sparse_files(tmp_path) -> None:
    opened = open_cache(write_sparse_cache(tmp_path / "sparse", n_shards=40, rows_per_shard=50_000, d_in=64))
    with Loader(opened, batch_size=512, order=Shuffle(pool_rows=20_000)) as loader:
        assert next(loader).x.shape == (512, 64)
    assert opened.n_rows == loader.n_rows == 2_000_000


@pytest.fixture
def lazily(monkeypatch):
    """A manifest of any size counts as a large one."""
    monkeypatch.setattr(signed, "LARGE_BYTES", 0)
    monkeypatch.setattr(check, "LISTED_SHARDS", 0)


def test_records_of_a_large_manifest_are_parsed_when_they_are_asked_for(make_cache, lazily, monkeypatch) -> None:
    path = make_cache(n_docs=100, rows_per_shard=256)
    lazy = open_cache(path)
    monkeypatch.setattr(signed, "LARGE_BYTES", 2**40)
    whole = open_cache(path)
    assert isinstance(lazy.records, LazyRecords)
    assert isinstance(whole.records, tuple)
    assert len(whole.records) > 3
    assert tuple(lazy.records) == whole.records
    assert lazy.shards == whole.shards
    assert lazy.facts() == whole.facts()
    assert lazy.manifest.to_json() == whole.manifest.to_json()
    assert [record.shard for record in lazy.records[1:3]] == [1, 2]
    assert counting._key(open_cache(path), SELECTION, []) == counting._key(whole, SELECTION, [])


def test_a_large_manifest_in_another_layout_is_parsed_whole(make_cache, lazily) -> None:
    path = make_cache()
    body = json.loads((path / MANIFEST).read_text())
    del body["xxh3"]
    head = json.dumps(body, indent=1).replace('   "shard": ', '   "shard":  ')[:-2].encode()
    tail = f',\n "xxh3": "{signed.signed.digest(head)}"\n}}\n'
    (path / MANIFEST).write_bytes(head + tail.encode())
    assert isinstance(open_cache(path).records, tuple)
    (path / MANIFEST).write_bytes(head + b"\n" + tail.encode())
    with pytest.raises(CorruptCacheError, match="the checksum in its last line does not fit"):
        open_cache(path)


def test_a_large_manifest_that_was_altered_is_refused(make_cache, lazily) -> None:
    path = make_cache()
    data = (path / MANIFEST).read_bytes()
    (path / MANIFEST).write_bytes(data.replace(b'"rows_into_buffer": ', b'"rows_into_buffer": 1', 1))
    with pytest.raises(CorruptCacheError, match="the checksum in its last line does not fit"):
        open_cache(path)


def test_missing_files_of_many_shards_are_named_and_sizes_are_checked_when_read(make_cache, lazily) -> None:
    path = make_cache(n_docs=100, rows_per_shard=256)
    file = open_cache(path).shard_path(None, 1)
    data = file.read_bytes()
    file.unlink()
    with pytest.raises(MissingFileError, match=r"c\.1\.0 is missing; restore it from a copy"):
        open_cache(path)
    file.write_bytes(data[:-1])
    opened = open_cache(path)
    with pytest.raises(CorruptCacheError, match=r"c\.1\.0 has changed its size"):
        opened.hook()[300]


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_more_shards_than_can_be_mapped_give_the_same_batches(make_cache, monkeypatch, dtype, previous) -> None:
    monkeypatch.setattr(calibrate, "MIN_ROWS", 16)  # the first document has fewer than int8 wants
    path = make_cache(n_docs=200, rows_per_shard=128, dtype=dtype)
    filters = Filters(min_position=1)
    options = {
        "batch_size": 64, "order": Shuffle(pool_rows=900, block_rows=3), "with_rows": True, "previous": previous,
        "selection": replace(SELECTION, filters=filters),
    }  # fmt: skip
    options["counts"] = account(open_cache(path), options["selection"], ["layer_3"])

    def batches() -> list:
        with Loader(open_cache(path), **options) as loader:
            return [next(loader) for _ in range(60)]

    expected = batches()
    monkeypatch.setattr(pools, "most_maps", lambda: 8)
    monkeypatch.setattr(readahead, "most_maps", lambda: 40)  # five files at a time
    monkeypatch.setattr(arrays.RowArray, "map", lambda *a: pytest.fail("a shard was mapped"))
    for batch, other in zip(expected, batches(), strict=True):
        assert batch.state == other.state
        assert torch.equal(batch.row_ids, other.row_ids)
        first, second = (x if isinstance(x, dict) else {"": x} for x in (batch.x, other.x))
        assert first.keys() == second.keys()
        assert all(torch.equal(rows, second[name]) for name, rows in first.items())


def test_a_process_of_few_descriptors_reads_and_shuffles_many_shards(tmp_path) -> None:
    """300 shards of 3 arrays, 128 descriptors: maps, the loader's pools, statistics and counts."""
    path = write_sparse_cache(tmp_path / "sparse", n_shards=300, rows_per_shard=64, d_in=8)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from sae_granary import open_cache
from sae_granary.cache.load.loader import Loader, Shuffle
from sae_granary.cache.load.selection import account
opened = open_cache({str(path)!r})
assert opened.hook()[::32].shape == (600, 8)
assert opened.stats().n_rows == 19_200
with Loader(opened, batch_size=512, order=Shuffle(pool_rows=4096)) as loader:
    assert sum(next(loader).n_rows for _ in range(40)) == 40 * 512
assert account(opened, loader.selection, opened.hook_points).total == 19_200
assert len(list(open_cache({str(path)!r}).hook()[9::64])) == 300
"""
    run_python(code)


@pytest.mark.slow
def test_a_billion_rows_are_opened_and_read_without_a_count(tmp_path, monkeypatch) -> None:
    """1,000 shards in sparse files: 1.5 TB of which the disk holds nothing."""
    path = write_sparse_cache(tmp_path / "sparse", n_shards=1000, rows_per_shard=1_000_000)
    opened = open_cache(path)
    assert opened.n_rows == 10**9
    assert len(json.loads((path / MANIFEST).read_text())["shards"]) == 1000
    assert sum(file.stat().st_blocks * 512 for file in path.rglob("*")) < 2**26
    with Loader(opened, batch_size=4096) as loader:
        assert next(loader).x.shape == (4096, 768)
        assert loader._counts.total < 10**8
    assert os.path.getsize(opened.shard_path(None, 0)) > 10**9


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak memory is not told here")
def test_the_first_batch_of_a_hundred_thousand_shards(tmp_path) -> None:
    """The files of 10^5 shards are links to a few; the process takes less than 2 GiB."""
    path = write_sparse_cache(tmp_path / "sparse", n_shards=100_000, rows_per_shard=4096, linked=True)
    code = f"""
from sae_granary import open_cache
from sae_granary.cache.load.loader import Loader
opened = open_cache({str(path)!r})
assert opened.n_rows == 409_600_000
with Loader(opened, batch_size=4096) as loader:
    assert next(loader).x.shape == (4096, 768)
peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])  # KiB
assert peak < 2**21, peak
"""
    run_python(code)
    shutil.rmtree(path)  # a million names, which pytest would keep
