"""Caches in blocks (format 3): joined into one cache, interrupted at any step, with and without hard links."""

import errno
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_kit import run_cache as run
from cache_kit import toy_buffer, toy_spec
from meanwhile_kit import meanwhile

from sae_granary import open_cache
from sae_granary.cache.errors import CacheMismatchError, IncompleteCacheError, SpecError
from sae_granary.cache.format.layout import BLOCKS, blocks_path
from sae_granary.cache.format.records import InBlocks, blocks_of
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write import blocks as blocks_module
from sae_granary.cache.write.blocks import begin_blocks, join_blocks, remove_blocks
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.quantities import byte_size

FROZEN = Path(__file__).parent / "data"
FEWER_BITS = {"provenance": {"model": {"id": "toy", "load_in": "4bit"}}}
N_BLOCKS = 3


def in_blocks(path: Path, **changes: object) -> list[tuple[int, Path]]:
    """A cache of three complete blocks, not joined yet: their numbers and folders."""
    told = {"model": "toy", "block_docs": 16}
    spec = toy_spec("float32", ("layer_1",), 4, block_docs=16, fingerprint=told, **changes)
    begin_blocks(path, spec)
    blocks = []
    for block in range(N_BLOCKS):
        folder = path / BLOCKS / f"{block:08d}"
        told = {**spec.fingerprint, "block": block}
        with CacheWriter.open(folder, replace(spec, fingerprint=told, vocabulary=None, block_docs=None)) as writer:
            for buffer in (2 * block, 2 * block + 1):
                rows, documents = toy_buffer(buffer, ("layer_1",), 4)
                writer.begin_buffer({"next_doc": 8 * buffer})
                writer.append(replace(rows, window=rows.window + np.uint64(block << 32)), documents)
            writer.finish({})
        blocks.append((block, folder))
    return blocks


def joined(path: Path, **changes: object) -> Path:
    join_blocks(path, in_blocks(path, **changes), {"n_documents": 24})
    remove_blocks(path)
    return path


def tree(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("version", "changes"), [(3, {}), (4, FEWER_BITS)])
def test_a_cache_in_blocks_opens_forever_and_the_same_bytes_are_written(
    tmp_path: Path, version: int, changes: dict[str, object]
) -> None:
    path = FROZEN / f"format{version}_tiny"
    frozen, today = open_cache(path), tree(joined(tmp_path / "today", **changes))
    assert verify(path).ok
    assert [record.block for record in frozen.records] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert frozen.n_rows == open_cache(tmp_path / "today").n_rows == 417
    for name, data in tree(path).items():
        if not name.startswith(("documents", "commits", "manifest")):  # pyarrow names its version
            assert today[name] == data
        elif name.endswith(".json"):
            assert json.loads(data)["version"] == json.loads(today[name])["version"] == version


def test_blocks_of_one_cache_share_every_setting(tmp_path: Path) -> None:
    in_blocks(tmp_path / "a")
    with pytest.raises(CacheMismatchError, match="rows_per_shard"):
        begin_blocks(tmp_path / "a", toy_spec("float32", ("layer_1",), 4, rows_per_shard=32, block_docs=16))
    with pytest.raises(SpecError, match="block_docs is 0, expected at least 1"):
        toy_spec("int8", block_docs=0)


@pytest.mark.parametrize("links", [True, False])
def test_a_join_that_was_interrupted_is_repeated(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(joined(tmp_path / "whole"))
    if not links:

        def no_link(source: object, target: object) -> None:
            if os.path.lexists(os.fspath(target)):  # type: ignore[call-overload]
                raise FileExistsError(errno.EEXIST, "exists")
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", no_link)
    before = tmp_path / "before"
    in_blocks(before)
    n_cuts = 0
    for step in range(1, 200, 13):
        path = tmp_path / f"cut_{step}"
        shutil.copytree(before, path)
        blocks = [(block, path / BLOCKS / f"{block:08d}") for block in range(N_BLOCKS)]
        with monkeypatch.context() as patch:
            done = _stop_after(patch, step)
            try:
                join_blocks(path, blocks, {"n_documents": 24})
            except KeyboardInterrupt:
                n_cuts += 1
        join_blocks(path, blocks, {"n_documents": 24})
        remove_blocks(path)
        assert {name: data for name, data in tree(path).items() if not name.startswith(".tmp")} == whole
        if done():
            break
    assert n_cuts > 4


def _stop_after(patch: pytest.MonkeyPatch, step: int):
    """Raise at the n-th name that is given to a file; tells whether there were fewer."""
    left, found = step, {name: getattr(os, name) for name in ("link", "rename", "replace")}

    def counted(name: str):
        def call(*args: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            found[name](*args)

        return call

    for name in found:
        patch.setattr(os, name, counted(name))
    return lambda: left > 0


def test_a_second_join_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    blocks = in_blocks(path)
    (path / "manifest.json").rename(tmp_path / "unfinished")
    shutil.copy(tmp_path / "unfinished", path / "manifest.json")
    join_blocks(path, blocks, {"n_documents": 24})
    before = tree(path)
    shutil.copy(tmp_path / "unfinished", path / "manifest.json")  # as another process may have read it
    join_blocks(path, blocks, {"n_documents": 24})
    assert tree(path) == before


def listed(folder: Path) -> dict[str, Any]:
    """What `sae-cache ls` says of the cache in a folder."""
    return json.loads(run("ls", folder, "--json").output)[0]


def test_commands_know_blocks_before_they_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    in_blocks(path)
    (path / BLOCKS / "00000000.json").write_text(json.dumps({"n_rows": 90}))
    with pytest.raises(IncompleteCacheError, match="90 rows in 1 complete block; run the same"):
        open_cache(path)
    assert verify(path).ok
    assert "90 (one per token) in 1 complete block, not joined yet" in run("info", path).output
    assert json.loads(run("info", path, "--json").output)["n_rows"] == 90
    assert listed(tmp_path)["state"] == "incomplete"
    (path / BLOCKS / "00000001.0.lease").write_text('{"pid": 1}')
    found = listed(tmp_path)
    assert (found["state"], found["n_rows"]) == ("growing", 90)
    assert found["n_bytes"] > 90 * 4
    assert "90 rows in 1 complete block" in run("diff", path, path, code=2).stderr
    assert "is being harvested in blocks" in run("rm", path, "--yes", code=2).stderr
    (path / BLOCKS / "00000001.0.lease").write_text('{"released": true}')
    assert "90 rows in blocks" in run("rm", path, stdin="n\n").output
    run("rm", path, "--yes")
    assert not path.exists()


def test_commands_know_that_a_complete_cache_is_being_extended(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    blocks = in_blocks(path)
    n_shards = len(join_blocks(path, blocks, {}).shards)
    remove_blocks(path)
    folder = path / BLOCKS / f"after_{n_shards:08d}"
    complete = listed(tmp_path)
    shutil.copytree(path / "commits", folder / "00000002")
    n_bytes = sum(len(data) for data in tree(folder).values())
    assert listed(tmp_path)["n_bytes"] == complete["n_bytes"] + n_bytes
    last = sum(record.n_rows for record in open_cache(path).records if record.block == 2)
    (folder / "00000002.json").write_text(json.dumps({"n_rows": last + 5}))  # all rows of the block that is continued
    (folder / "00000003.json").write_text(json.dumps({"n_rows": 100}))
    assert blocks_of(path) == InBlocks(2, 105)
    asked = run("rm", path, stdin="n\n").output
    assert f"{complete['n_rows']} rows, {byte_size(listed(tmp_path)['n_bytes'])}" in asked
    for lease, state, code in (('{"pid": 1}', "growing", 2), ('{"released": true}', "complete", 0)):
        (folder / "00000002.0.lease").write_text(lease)
        assert listed(tmp_path)["state"] == state
        run("rm", path, "--yes", code=code)
    assert not path.exists()


def test_a_cache_in_blocks_travels_and_converts(tmp_path: Path) -> None:
    path, there = joined(tmp_path / "cache"), f"file://{tmp_path}/there"
    run("push", path, there)
    run("pull", there, tmp_path / "back")
    run("pull", there, tmp_path / "part", "--rows", 100)
    run("convert", path, tmp_path / "rounded", "--dtype", "bfloat16")
    assert tree(tmp_path / "back") == tree(path)
    assert verify(tmp_path / "part").ok
    assert open_cache(tmp_path / "part").manifest.block_docs == 16
    assert open_cache(tmp_path / "rounded").manifest.version == 1


def test_the_blocks_of_an_extension_outlive_those_before_it(tmp_path: Path) -> None:
    complete = join_blocks(tmp_path, in_blocks(tmp_path), {"n_documents": 24})
    extension = tmp_path / blocks_path(len(complete.shards))
    begun = [extension / "plan.json", extension / "00000000" / "manifest.json"]
    for file in begun:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    remove_blocks(tmp_path, len(complete.shards))
    assert [file for file in sorted((tmp_path / BLOCKS).rglob("*")) if file.is_file()] == sorted(begun)
    remove_blocks(tmp_path)
    assert not (tmp_path / BLOCKS).exists()


def test_processes_that_begin_and_end_together_do_not_disturb_each_other(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(300):
                with blocks_module._session(tmp_path):
                    pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("there", [False, True])
def test_processes_may_begin_a_cache_between_any_two_calls_of_each_other(tmp_path: Path, there: bool) -> None:
    path, spec = tmp_path / "cache", toy_spec("float32", ("layer_1",), 4, block_docs=16)

    def start() -> None:
        shutil.rmtree(path, ignore_errors=True)
        if there:
            path.mkdir()

    begun = list(meanwhile(lambda: begin_blocks(path, spec), lambda: begin_blocks(path, spec), start))
    assert len(begun) > 20
    assert all(manifest == begun[0] for manifest in begun)
