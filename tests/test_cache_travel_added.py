"""Caches that were extended, or given hook points, are pushed, pulled, compared, converted and removed as a whole."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_kit import contents, harvest, toy_buffer, toy_spec
from test_cache_travel import copies, faulty, run  # noqa: F401

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError, CacheLockedError
from sae_granary.cache.format.layout import ADDED
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.read.verify import verify
from sae_granary.cache.remote import store
from sae_granary.cache.remote.pull import plan_pull, pull
from sae_granary.cache.remote.push import plan_push, push
from sae_granary.cache.write.remove import remove_cache
from sae_granary.cache.write.session import locked
from sae_granary.cache.write.writer import CacheWriter

# ruff: noqa: F811


def grow(path: Path, buffers: range) -> None:
    """Extend a toy cache, as `--extend` does."""
    with CacheWriter.open(path, toy_spec(), extend=True) as writer:
        for number in buffers:
            rows, documents = toy_buffer(number)
            writer.begin_buffer({"buffer": number})
            writer.append(rows, documents)
        writer.finish({"documents": 0})


def add(path: Path) -> Path:
    """Give it the hook point layer_2: another harvest's, on the same rows."""
    spec = toy_spec(hooks=("layer_2",))
    spec = replace(spec, fingerprint={**spec.fingerprint, "hook_points": "layer_2"}, vocabulary=None)
    harvest(path / ADDED / "layer_2", spec)
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same cache without and with the added hook point."""
    folder = tmp_path_factory.mktemp("added")
    harvest(folder / "plain")
    return folder / "plain", add(Path(shutil.copytree(folder / "plain", folder / "c")))


def test_added_hook_points_travel_with_their_cache(tmp_path, both, copies):
    url = f"file://{tmp_path}/remote"
    assert "with layer_2" in run("push", both[1], url, "--dry-run").stdout
    run("push", both[1], url, "--verify")
    assert "nothing to do" in run("push", both[1], url).stdout
    run("pull", url, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(both[1])
    assert list(open_cache(tmp_path / "back").hook_points) == ["layer_1", "layer_3", "layer_2"]
    assert verify(tmp_path / "back").ok
    assert not verify(tmp_path / "back").foreign
    assert "nothing to do" in run("pull", url, tmp_path / "back").stdout
    assert "layer_2" in open_cache(url).hook_points


@pytest.mark.parametrize("hooks", [["layer_2"], ["layer_1", "layer_2"]])
def test_a_part_with_an_added_hook_point_is_one_cache(tmp_path, both, hooks):
    whole = open_cache(both[1])
    n_rows = whole.shards[0].n_rows + 1
    run("pull", f"file://{both[1]}", tmp_path / "part", "--hook", ",".join(hooks), "--rows", n_rows)
    part = open_cache(tmp_path / "part")
    assert list(part.hook_points) == hooks
    assert not part.additions
    assert part.manifest.vocabulary == whole.manifest.vocabulary
    for name in hooks:
        np.testing.assert_array_equal(part.hook(name)[:], whole.hook(name)[: part.n_rows])
    assert verify(tmp_path / "part").ok
    run("push", both[1], f"file://{tmp_path}/pushed", "--hook", ",".join(hooks), "--rows", n_rows)
    assert contents(tmp_path / "pushed") == contents(tmp_path / "part")


def test_an_older_remote_is_brought_up_to_date_and_a_newer_one_is_not_set_back(tmp_path, both):
    url, old = f"file://{tmp_path}/remote", Path(shutil.copytree(both[0], tmp_path / "old"))
    run("push", old, url)
    plan = plan_push(both[1], url)  # it lacks a hook point
    assert plan.is_there
    assert all(len(part.missing) == len(part.parcel.files) for part in plan.added)
    push(plan)
    before = contents(tmp_path / "remote")
    assert before == contents(both[1])
    run("push", old, url)  # this one lacks it: the remote keeps its own
    assert contents(tmp_path / "remote") == before
    longer = Path(shutil.copytree(both[1], tmp_path / "longer"))
    grow(longer, range(6, 8))
    run("push", longer, url)  # it lacks shards
    assert contents(tmp_path / "remote") == contents(longer)
    assert "is newer" in run("push", both[1], url, code=2).stderr
    run("pull", url, old)  # the folder lacks shards and a hook point
    assert contents(old) == contents(longer)
    assert verify(old).ok
    assert "is newer" in run("pull", f"file://{both[1]}", old, code=2).stderr
    assert "layer_2 was added to" in run("pull", url, tmp_path / "x", "--hook", "layer_2", code=2).stderr


def test_half_a_push_of_a_hook_point_is_left_out_and_finished_later(tmp_path, both, faulty):
    push(plan_push(both[0], "faulty://b/c"))
    faulty.n_requests, faulty.faults = 0, dict.fromkeys(range(20, 10_000), "error")
    with pytest.raises(store.RemoteError):
        push(plan_push(both[1], "faulty://b/c"))
    faulty.faults = {}
    assert "left out: faulty://b/c/added/layer_2" in run("pull", "faulty://b/c", tmp_path / "back").stderr
    assert contents(tmp_path / "back") == contents(both[0])
    plan = plan_push(both[1], "faulty://b/c")
    assert 0 < len(plan.added[0].missing) < len(plan.added[0].parcel.files)
    push(plan)
    pull(plan_pull("faulty://b/c", tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(both[1])


def test_a_pull_that_was_cut_off_in_a_hook_point_continues(tmp_path, both, faulty):
    push(plan_push(both[1], "faulty://b/c"))
    faulty.n_requests, faulty.faults = 0, dict.fromkeys(range(20, 10_000), "error")
    with pytest.raises(store.RemoteError):
        pull(plan_pull("faulty://b/c", tmp_path / "back"))
    assert not (tmp_path / "back/manifest.json").exists()
    faulty.faults = {}
    pull(plan_pull("faulty://b/c", tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(both[1])


def test_a_hook_point_that_is_there_under_another_folder_is_refused(tmp_path, both):
    run("push", both[1], f"file://{tmp_path}/remote")
    other = Path(shutil.copytree(both[1], tmp_path / "other"))
    (other / "added/layer_2").rename(other / "added/twice")
    before = contents(tmp_path / "remote")
    assert "hook point layer_2 twice" in run("push", other, f"file://{tmp_path}/remote", code=2).stderr
    assert "hook point layer_2 twice" in run("pull", f"file://{tmp_path}/remote", other, code=2).stderr
    assert contents(tmp_path / "remote") == before


def test_diff_verify_ls_and_convert_know_added_hook_points(tmp_path, both):
    assert "added hook points: 'none' and 'layer_2'" in run("diff", *both, code=1).stdout
    assert "the same" in run("diff", both[1], both[1]).stdout
    assert json.loads(run("ls", both[1].parent, "--json").stdout)[0]["hook_points"][-1] == "layer_2"
    run("convert", both[1], tmp_path / "single", "--dtype", "float32")
    made = open_cache(tmp_path / "single")
    assert list(made.hook_points) == ["layer_1", "layer_3", "layer_2"]
    assert [hook.name for hook in made.manifest.hook_points] == ["layer_1", "layer_3"]
    want = np.asarray(open_cache(both[1]).hook("layer_2")[:]).astype(np.float32)
    np.testing.assert_array_equal(made.hook("layer_2")[:], want)
    assert verify(tmp_path / "single").ok


def test_verify_finds_an_addition_with_other_rows(tmp_path, both):
    path = Path(shutil.copytree(both[0], tmp_path / "c"))
    spec = toy_spec(hooks=("layer_2",))
    spec = replace(spec, fingerprint={**spec.fingerprint, "hook_points": "layer_2"}, vocabulary=None)
    with CacheWriter.open(path / ADDED / "layer_2", spec) as writer:
        for number in range(6):
            rows, documents = toy_buffer(number, ("layer_2",))
            writer.begin_buffer({"buffer": number})
            writer.append(replace(rows, token_id=np.where(rows.token_id > 2, 3, 1).astype(np.int32)), documents)
        writer.finish({})
    assert any("is not that of the cache" in str(finding.problem) for finding in verify(path).problems)


def test_rm_removes_added_hook_points_but_not_one_that_is_being_added(tmp_path, both):
    path = Path(shutil.copytree(both[1], tmp_path / "c"))
    lock = locked(path / ADDED / "layer_2")
    assert json.loads(run("ls", tmp_path, "--json").stdout)[0]["state"] == "growing"
    with pytest.raises(CacheLockedError):
        remove_cache(path)
    lock.release()
    (path / ADDED / "notes.txt").touch()
    with pytest.raises(CacheError, match=r"added/notes\.txt"):
        remove_cache(path)
    (path / ADDED / "notes.txt").unlink()
    assert load_manifest(path).complete
    run("rm", path, "--yes")
    assert not path.exists()
