"""What a command sees of a cache that another process changes between any two of its file calls."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cache_kit import harvest, interrupted, toy_buffer, toy_spec
from meanwhile_kit import meanwhile

from sae_granary.cache.errors import NotACacheError
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.read import verify as checks
from sae_granary.cache.read.added import Addition, additions
from sae_granary.cache.read.listing import list_caches
from sae_granary.cache.read.reader import open_local
from sae_granary.cache.write import remove
from sae_granary.cache.write.remove import check_removable
from sae_granary.cache.write.writer import CacheWriter

SPEC = toy_spec("float32", ("layer_1",), 4, rows_per_shard=64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "toy"
    harvest(path, SPEC, 1)
    return path


def removed(act: Callable[[], object], cache: Path) -> list[object]:
    """What `act` returns when another process removes the cache before its n-th file call, for each n."""
    aside = cache.parent.with_name("aside")

    def start() -> None:
        if aside.exists():
            aside.rename(cache)

    found = list(meanwhile(act, lambda: cache.rename(aside), start))
    start()
    return found


def test_a_cache_that_is_removed_while_caches_are_listed_is_not_called_damaged(cache: Path) -> None:
    listed = removed(lambda: [entry.state for entry in list_caches(cache.parent)], cache)
    assert listed.count([]) > 20
    assert listed.count([]) + listed.count(["complete"]) == len(listed)


@pytest.mark.parametrize("incomplete", [False, True])
def test_a_cache_that_is_removed_while_it_is_opened_and_read_is_gone_not_damaged(cache: Path, incomplete: bool) -> None:
    def read() -> str:
        try:
            return open_local(cache, allow_incomplete=incomplete).document(0).text
        except FileNotFoundError as error:
            return str(error)

    ends = {str(end).removeprefix(str(cache)).split(";")[0] for end in removed(read, cache)}
    gone = {
        f"/{file} has gone since the cache was opened" for file in ("rows/doc_id/c.0", "documents/00000000.parquet")
    }
    assert ends == {" does not exist", *gone}


def test_a_cache_that_is_removed_while_another_removal_begins_is_gone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> str:
        try:
            return check_removable(cache).dtype
        except NotACacheError as error:
            return str(error)

    monkeypatch.setattr(remove, "_readers", lambda path: [])
    ends = {str(end).removeprefix(str(cache)).split(";")[0] for end in removed(check, cache)}
    assert ends == {" does not exist", " is being removed by another process, or was", "float32"}


@pytest.mark.slow
def test_a_cache_that_is_removed_while_it_is_verified_is_gone(cache: Path) -> None:
    reports = removed(lambda: [finding.problem for finding in checks.verify(cache).problems], cache)
    gone = [[f"{cache} does not exist; `sae-harvest run --out {cache}` makes a cache, `sae-cache ls` lists them"]]
    assert all(problems in ([], *gone) for problems in reports)
    assert gone[0] in reports


def test_shards_that_are_committed_while_a_cache_is_verified_are_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = interrupted(tmp_path / "toy", SPEC, 40), checks.open_local

    def opens_first(*args: object, **options: bool) -> object:
        cache = opened(*args, **options)  # type: ignore[arg-type]
        harvest(path, SPEC, 3)
        return cache

    monkeypatch.setattr(checks, "open_local", opens_first)
    report = checks.verify(path)
    assert report.ok
    assert report.foreign == ()


def test_a_cache_that_is_extended_while_it_is_verified_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "toy", checks.open_local
    harvest(path, SPEC, 1)

    def opens_first(*args: object, **options: bool) -> object:
        monkeypatch.setattr(checks, "open_local", opened)
        cache = opened(*args, **options)  # type: ignore[arg-type]
        with CacheWriter.open(path, SPEC, extend=True) as writer:
            writer.begin_buffer({"buffer": 1})
            writer.append(*toy_buffer(1, ("layer_1",), 4))
            writer.finish({})
        return cache

    monkeypatch.setattr(checks, "open_local", opens_first)
    assert checks.verify(path) == checks.verify(path)
    assert checks.verify(path).ok


def test_an_addition_that_is_removed_while_a_cache_is_opened_is_left_out(cache: Path, tmp_path: Path) -> None:
    (cache / "added").mkdir()
    shutil.copytree(cache, tmp_path / "layer_3", ignore=shutil.ignore_patterns("added"))
    added = cache / "added" / "layer_3"
    (tmp_path / "layer_3").rename(added)
    found = removed(lambda: len(load_additions(cache)), cache / "added")
    assert set(found) == {0, 1}
    shutil.rmtree(cache / "added")


def load_additions(cache: Path) -> tuple[Addition, ...]:
    manifest = load_manifest(cache)
    points = (replace(manifest.hook_points[0], name="another"),)
    return additions(cache, replace(manifest, hook_points=points))
