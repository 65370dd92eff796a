"""sae-cache push and pull: file:// and memory://, faults on the way, parts of a cache, and what is refused."""

import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from cache_kit import contents, edit_signed, harvest, interrupted, toy_spec
from cache_kit import run_cache as run
from fsspec.implementations.memory import MemoryFileSystem

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError, CorruptCacheError
from sae_granary.cache.read.verify import verify
from sae_granary.cache.remote import fetch, store
from sae_granary.cache.remote.pull import plan_pull, pull
from sae_granary.cache.remote.push import plan_push, push


class Faulty(MemoryFileSystem):
    """A remote that fails: `faults` maps the number of a request to what happens to it."""

    protocol = "faulty"
    store, pseudo_dirs = {}, [""]
    faults, n_requests, lock = {}, 0, threading.Lock()

    @classmethod
    def _next(cls):
        with cls.lock:
            cls.n_requests += 1
            return cls.faults.get(cls.n_requests)

    def cat_file(self, path, start=None, end=None, **kwargs):
        fault, data = self._next(), super().cat_file(path, start=start, end=end)
        if fault == "error":
            raise OSError("500 Internal Server Error")
        if fault == "short":
            return data[: len(data) // 2]
        if fault == "wrong" and data:
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    def put_file(self, lpath, rpath, **kwargs):
        fault = self._next()
        if fault == "error":
            raise OSError("connection reset")
        super().put_file(lpath, rpath)
        if fault == "short":
            self.pipe_file(rpath, self.cat(rpath)[:-3])


@pytest.fixture
def faulty(monkeypatch):
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    monkeypatch.setattr(store, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(store, "LONGEST_WAIT", 0.0)
    monkeypatch.setattr(store, "_LOCAL", ("file", "local", "memory", "faulty"))
    monkeypatch.setattr(fetch, "BLOCK_BYTES", 300)
    Faulty.faults, Faulty.n_requests = {}, 0
    Faulty.store.clear()
    return Faulty


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("travel") / "c"
    harvest(path)
    (path / "about.json").write_text('{"runs": []}')
    (path / "harvest.log").write_text("started")
    return path


@pytest.mark.parametrize("url", ["file://{}/remote", "memory://bucket/c"])
def test_there_and_back_gives_the_same_bytes(tmp_path, cache, url):
    url = url.format(tmp_path)
    assert "nothing was copied" in run("push", cache, url, "--dry-run").stdout
    run("push", cache, url, "--verify")
    assert "nothing to do" in run("push", cache, url).stdout
    there = store.Store(url).listing()
    assert "manifest.json" in there
    assert not {"about.json", "harvest.log", ".push"} & set(there)
    run("pull", url, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(cache)
    assert verify(tmp_path / "back").ok
    assert not verify(tmp_path / "back").foreign
    assert "nothing to do" in run("pull", url, tmp_path / "back").stdout


def test_a_part_is_a_cache_of_its_own(tmp_path, cache):
    whole = open_cache(cache)
    run("pull", f"file://{cache}", tmp_path / "part", "--hook", "layer_3", "--rows", whole.shards[0].n_rows + 1)
    part = open_cache(tmp_path / "part")
    assert (list(part.hook_points), len(part.shards)) == (["layer_3"], 2)
    n = part.n_rows
    np.testing.assert_array_equal(part.hook("layer_3")[:n], whole.hook("layer_3")[:n])
    assert verify(tmp_path / "part").ok
    assert part.manifest.fingerprint != whole.manifest.fingerprint
    run("push", cache, f"file://{tmp_path}/pushed", "--hook", "layer_3", "--rows", n)
    assert contents(tmp_path / "pushed") == contents(tmp_path / "part")
    assert (
        "no hook point 'layer_9'" in run("pull", f"file://{cache}", tmp_path / "x", "--hook", "layer_9", code=2).stderr
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["error", "short", "wrong"])
def test_faults_on_the_way_are_repaired(tmp_path, cache, faulty, kind):
    faulty.faults = dict.fromkeys(range(3, 400, 5), kind) if kind != "wrong" else {}
    push(plan_push(cache, "faulty://b/c"))
    faulty.n_requests, faulty.faults = 0, dict.fromkeys(range(3, 2000, 90 if kind == "wrong" else 5), kind)
    pull(plan_pull("faulty://b/c", tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(cache)
    assert faulty.n_requests > 50


def test_a_wrong_byte_at_the_remote_never_arrives(tmp_path, cache, faulty):
    push(plan_push(cache, "faulty://b/c"))
    name = next(name for name in faulty.store if name.endswith("activations/layer_1/c.0.0"))
    data = bytearray(faulty.store[name].getvalue())
    data[5] ^= 1
    faulty().pipe_file(name, bytes(data))
    with pytest.raises(CorruptCacheError, match=r"activations/layer_1/c\.0\.0: the checksum does not fit"):
        pull(plan_pull("faulty://b/c", tmp_path / "back"))
    assert not (tmp_path / "back/manifest.json").exists()
    with pytest.raises(CacheError, match="nothing yet"):
        open_cache(tmp_path / "back")
    with pytest.raises(CorruptCacheError, match="arrived"):
        push(plan_push(cache, "faulty://b/c"), verify=True)


def test_a_push_and_a_pull_that_were_cut_off_continue(tmp_path, cache, faulty):
    faulty.faults = dict.fromkeys(range(9, 10000), "error")
    with pytest.raises(store.RemoteError, match="the same command continues"):
        push(plan_push(cache, "faulty://b/c"))
    with pytest.raises(CacheError, match="a push has not finished there"):
        plan_pull("faulty://b/c", tmp_path / "back")
    faulty.faults = {}
    plan = plan_push(cache, "faulty://b/c")
    assert 0 < len(plan.missing) < len(plan.parcel.files)
    push(plan)
    faulty.n_requests, faulty.faults = 0, dict.fromkeys(range(60, 10000), "error")
    with pytest.raises(store.RemoteError):
        pull(plan_pull("faulty://b/c", tmp_path / "back"))
    faulty.faults = {}
    plan = plan_pull("faulty://b/c", tmp_path / "back")
    assert 0 < len(plan.missing) < len(plan.parcel.files)
    pull(plan)
    assert contents(tmp_path / "back") == contents(cache)


def test_what_is_there_is_not_overwritten(tmp_path, cache):
    harvest(tmp_path / "other", toy_spec("float32"))
    run("push", cache, f"file://{tmp_path}/remote")
    before = contents(tmp_path / "remote")
    assert "another cache" in run("push", tmp_path / "other", f"file://{tmp_path}/remote", code=2).stderr
    assert "another cache" in run("pull", f"file://{tmp_path}/remote", tmp_path / "other", code=2).stderr
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").touch()
    assert "not a cache" in run("push", cache, f"file://{tmp_path}/notes", code=2).stderr
    assert "not a cache" in run("pull", f"file://{tmp_path}/remote", tmp_path / "notes", code=2).stderr
    assert "nothing is there" in run("pull", f"file://{tmp_path}/none", tmp_path / "new", code=2).stderr
    interrupted(tmp_path / "half")
    assert "incomplete" in run("push", tmp_path / "half", f"file://{tmp_path}/new", code=2).stderr
    assert "unfinished" in run("pull", f"file://{tmp_path}/remote", tmp_path / "half", code=2).stderr
    assert contents(tmp_path / "remote") == before
    assert not (tmp_path / "new").exists()


def test_a_damaged_file_is_not_pushed(tmp_path, cache):
    damaged = Path(shutil.copytree(cache, tmp_path / "c"))
    shard = damaged / "norms/layer_3/c.0"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert "nothing damaged is pushed" in run("push", damaged, f"file://{tmp_path}/remote", code=2).stderr
    assert not (tmp_path / "remote/manifest.json").exists()


def test_a_manifest_that_names_other_files_is_refused(tmp_path, cache):
    evil = Path(shutil.copytree(cache, tmp_path / "evil"))
    edit_signed(evil / "manifest.json", lambda body: body["zarr"].update({"../../escaped": body["zarr"]["zarr.json"]}))
    assert "Zarr files" in run("pull", f"file://{evil}", tmp_path / "back", code=2).stderr
    assert not (tmp_path / "back").exists()


def test_a_place_without_rights_or_driver_is_one_line(tmp_path, cache, faulty, monkeypatch):
    asked = []

    def refuse(self, path, *args, **kwargs):
        asked.append(path)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(Faulty, "put_file", refuse)
    error = run("push", cache, "faulty://b/c", code=2).stderr
    assert "no right to write faulty://b/c/" in error
    assert error.count("\n") == 1
    assert len(asked) == len(set(asked)) > 0  # none is tried again
    assert "nosuch" in run("push", cache, "nosuch://b/c", code=2).stderr


def test_public_places_need_yes(cache, faulty, monkeypatch):
    monkeypatch.setattr(store, "_LOCAL", ())
    assert "add --yes" in run("push", cache, "faulty://b/public").stdout
    assert faulty.store == {}
    run("push", cache, "faulty://b/public", "--yes")
    assert "faulty://b/public is complete" in run("push", cache, "faulty://b/public").stdout


@pytest.fixture
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv("GRANARY_REMOTE_DIR", str(tmp_path / "copies"))
    return tmp_path / "copies"


def test_a_url_is_read_through_a_verified_copy(cache, faulty, copies, capsys):
    push(plan_push(cache, "faulty://b/c"))
    rows = open_cache("faulty://b/c")
    np.testing.assert_array_equal(rows.hook("layer_1")[:], open_cache(cache).hook("layer_1")[:])
    assert rows.path.parent == copies
    assert "ok (" in run("verify", "faulty://b/c").stdout
    faulty.n_requests, faulty.faults = 0, dict.fromkeys(range(1, 10_000), "error")
    assert open_cache("faulty://b/c").n_rows == rows.n_rows  # out of reach: the copy is complete
    assert f"reading the local copy {rows.path}" in capsys.readouterr().err
    faulty.faults = {}
    faulty.store.clear()
    with pytest.raises(CacheError, match=f"nothing is there; its local copy is complete: --cache {rows.path} reads it"):
        open_cache("faulty://b/c")


def test_copies_are_bounded(tmp_path, cache, faulty, copies, monkeypatch):
    size = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())
    for name in ("one", "two"):
        push(plan_push(cache, f"faulty://b/{name}"))
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(size * 3 // 2))
    open_cache("faulty://b/one")
    open_cache("faulty://b/two")
    assert [path.parent.name[:3] for path in copies.glob("*/manifest.json")] == ["two"]
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", "1000")
    with pytest.raises(CacheError, match="GRANARY_REMOTE_BYTES"):
        open_cache("faulty://b/one")
