# ruff: noqa: F811
"""What `pull --dry-run` tells is what a pull fetches and takes; copies of URLs, halves too, stay within their limit."""

import os
import re
import shutil
from pathlib import Path

import pytest
from test_cache_travel import Faulty, cache, copies, faulty, run  # noqa: F401
from test_cache_travel_added import add

from sae_granary import open_cache
from sae_granary.cache.remote import pull as pulling
from sae_granary.cache.remote import store
from sae_granary.cache.remote.pull import plan_pull, pull
from sae_granary.cache.remote.push import plan_push, push
from sae_granary.common import files as common_files

URL = "faulty://b/c"
UNSENT = ("about.json", "harvest.log")


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != ".lock")


@pytest.fixture
def fetched(monkeypatch) -> list[int]:
    """The sizes of the replies of the remote."""
    sizes, real = [], Faulty.cat_file

    def counted(self, *args, **kwargs):
        data = real(self, *args, **kwargs)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(Faulty, "cat_file", counted)
    return sizes


@pytest.mark.parametrize("flags", [[], ["--hook", "layer_1,layer_2", "--rows", "1"]])
def test_a_plan_of_a_pull_tells_its_bytes(tmp_path, cache, faulty, fetched, flags) -> None:
    push(plan_push(add(Path(shutil.copytree(cache, tmp_path / "c"))), URL))
    told = run("pull", URL, tmp_path / "back", "--dry-run", *flags).stdout
    assert not (tmp_path / "back").exists()
    n_fetched, needed, free = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", told))
    assert f"{needed:,} bytes" in told
    assert free > needed
    options = {"hooks": ["layer_1", "layer_2"], "n_rows": 1} if flags else {}
    plan = plan_pull(URL, tmp_path / "back", **options)
    fetched.clear()
    pull(plan)
    assert n_fetched == sum(fetched) > 0
    assert needed == disk_bytes(tmp_path / "back")


def test_a_plan_of_a_pull_that_continues_tells_what_is_left(tmp_path, cache, faulty, fetched, monkeypatch) -> None:
    push(plan_push(cache, URL))
    monkeypatch.setattr(store, "THREADS", 1)  # file by file: the pull ends in the middle of one
    faulty.n_requests, faulty.faults = 0, dict.fromkeys(range(60, 10_000), "error")
    with pytest.raises(store.RemoteError):
        pull(plan_pull(URL, tmp_path / "back"))
    faulty.faults = {}
    there = disk_bytes(tmp_path / "back/.tmp") - (tmp_path / "back/.tmp/pull/manifest.wanted").stat().st_size
    plan = plan_pull(URL, tmp_path / "back")
    assert plan.n_begun > 0
    assert plan.disk_bytes + there == disk_bytes(cache) - sum((cache / n).stat().st_size for n in UNSENT)
    left = plan.n_bytes - plan.n_begun
    fetched.clear()
    pull(plan)
    assert left == sum(fetched)


def test_a_pull_that_does_not_fit_is_refused_before_the_first_byte(tmp_path, cache, faulty, monkeypatch) -> None:
    push(plan_push(cache, URL))
    needed = plan_pull(URL, tmp_path / "back").disk_bytes
    monkeypatch.setattr(common_files, "free_bytes", lambda path: needed - 1)
    assert "it does NOT fit" in run("pull", URL, tmp_path / "back", "--plan", code=1).stdout
    assert re.search(r"no space for .*back: .* needed, .* free", run("pull", URL, tmp_path / "back", code=2).stderr)
    assert not (tmp_path / "back").exists()
    monkeypatch.setattr(common_files, "free_bytes", lambda path: needed)
    run("pull", URL, tmp_path / "back")


def test_a_plan_of_a_pull_onto_a_file_is_refused(tmp_path, cache, faulty) -> None:
    push(plan_push(cache, URL))
    (tmp_path / "file").write_text("mine")
    for target in ("file", "file/below/it"):
        assert "file is a file, expected a folder" in run("pull", URL, tmp_path / target, "--dry-run", code=2).stderr


def half_copy(url: str, faulty: type[Faulty]) -> None:
    """Open a cache at a URL whose remote breaks off in the middle."""
    faulty.n_requests, faulty.faults = 0, dict.fromkeys(range(60, 10_000), "error")
    with pytest.raises(store.RemoteError):
        open_cache(url)
    faulty.faults = {}


def test_half_copies_count_against_the_limit_and_make_room(cache, faulty, copies, monkeypatch) -> None:
    for name in ("one", "two", "three"):
        push(plan_push(cache, f"faulty://b/{name}"))
    half_copy("faulty://b/one", faulty)
    [half] = copies.iterdir()
    os.utime(half, (1, 1))
    size = plan_pull("faulty://b/two", copies / "x").total_bytes
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(size + disk_bytes(half) - 1))
    two = open_cache("faulty://b/two")
    assert not half.exists()
    assert list(copies.iterdir()) == [two.path]
    half_copy("faulty://b/three", faulty)  # made room for, as a whole one
    assert two.path.exists()  # it is open
    path = two.path
    del two
    half_copy("faulty://b/three", faulty)
    assert not path.exists()
    lock = pulling.locked(next(copies.iterdir()))  # still on its way
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(size))
    assert open_cache("faulty://b/two").n_rows == open_cache(cache).n_rows
    assert sorted(place.name[:3] for place in copies.iterdir()) == ["thr", "two"]
    lock.release()
