"""Copies of remote caches that several processes fetch, remove and push at once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_kit import harvest, toy_spec
from meanwhile_kit import meanwhile
from stage_kit import staged

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError
from sae_granary.cache.format.layout import MANIFEST
from sae_granary.cache.read.verify import verify
from sae_granary.cache.remote import mirror, stage
from sae_granary.cache.remote import pull as pulling
from sae_granary.cache.remote.pull import plan_pull, pull
from sae_granary.cache.remote.push import plan_push, push
from sae_granary.cache.remote.store import MARKER, Store

pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The URLs of two caches of one shard."""
    folder = tmp_path_factory.mktemp("remote")
    for name, d_in in (("a", 4), ("b", 5)):
        harvest(folder / name, toy_spec("float32", ("layer_1",), d_in), 1)
    return {name: f"file://{folder / name}" for name in "ab"}


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRANARY_REMOTE_DIR", str(tmp_path / "copies"))
    return tmp_path / "copies"


def test_a_pull_does_not_overwrite_another_cache_that_came_since_it_was_planned(
    caches: dict[str, str], tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    plan = plan_pull(caches["a"], target)
    pull(plan_pull(caches["b"], target))
    with pytest.raises(CacheError, match=r"copy holds another cache than file://.*/a: use another place"):
        pull(plan)
    assert verify(target).ok
    assert open_cache(target).hook_points["layer_1"].d_in == 5


def test_a_pull_is_planned_while_another_one_ends_or_its_copy_is_removed(
    caches: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, half, whole = (tmp_path / name for name in ("copy", "half", "whole"))
    pull(plan_pull(caches["a"], whole))
    with monkeypatch.context() as patch:
        patch.setattr(pulling, "_place", lambda plan, stage: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pull(plan_pull(caches["a"], half))
    store = Store(caches["a"])
    parcel = pulling.remote_parcel(store, store.listing())

    def plan() -> tuple[bool, int]:
        found = pulling._plan(store, target, parcel)
        return found.complete, found.disk_bytes

    def start(now: Path) -> None:
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(now, target)

    def removed() -> None:
        target.rename(tmp_path / "gone")

    def ended() -> None:
        removed()
        shutil.copytree(whole, target)

    assert len(list(meanwhile(plan, removed, lambda: start(whole)))) > 20
    assert len(list(meanwhile(plan, ended, lambda: start(half)))) > 20


@pytest.mark.parametrize("by_shard", [False, True])
def test_a_copy_that_is_removed_before_it_is_open_is_copied_again(
    caches: dict[str, str], copies: Path, monkeypatch: pytest.MonkeyPatch, by_shard: bool
) -> None:
    made = mirror.mirrored
    removed = []

    def makes(url: str, **options: bool) -> Path:
        folder = made(url, **options)
        if not removed:
            removed.append(folder)
            shutil.rmtree(folder)
        return folder

    monkeypatch.setattr(mirror, "mirrored", makes)
    monkeypatch.setattr(mirror, "AGAIN", 0.0)
    cache = open_cache(caches["a"], by_shard=by_shard)
    assert removed == [cache.path]
    assert len(cache.column("doc_id")[:]) == cache.n_rows


def test_a_copy_is_not_removed_while_it_is_open(
    caches: dict[str, str], copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_cache(caches["a"])
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(plan_pull(caches["b"], copies / "x").total_bytes))
    open_cache(caches["b"])
    assert len(first.hook("layer_1")[:]) == first.n_rows
    path = first.path
    del first
    shutil.rmtree(open_cache(caches["b"]).path)
    open_cache(caches["b"])
    assert not path.exists()


def test_two_processes_push_one_cache_at_once(
    caches: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, url = Path(caches["a"].removeprefix("file://")), f"file://{tmp_path}/there"
    first, write = plan_push(source, url), Store.write

    def writes(store: Store, path: str, data: bytes) -> None:
        if path == MANIFEST:
            monkeypatch.setattr(Store, "write", write)
            push(plan_push(source, url))
        write(store, path, data)

    monkeypatch.setattr(Store, "write", writes)
    push(first)
    assert verify(tmp_path / "there").ok
    assert not (tmp_path / "there" / MARKER).exists()


def test_copies_that_are_removed_as_a_process_begins_to_read_them_are_made_again(
    caches: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, check = Path(caches["a"].removeprefix("file://")), stage._check_owner

    def removed(place: Path) -> None:
        shutil.rmtree(place)
        check(place)

    monkeypatch.setattr(stage, "_check_owner", removed)
    (tmp_path / "disk").mkdir()
    found = staged(cache, tmp_path / "disk").hook("layer_1")
    np.testing.assert_array_equal(found[:], open_cache(cache).hook("layer_1")[:])
