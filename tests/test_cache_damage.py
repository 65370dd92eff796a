"""Damaged, foreign and hostile caches: one clear error, never a traceback from a library, never silence."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from cache_kit import edit_signed, flip, harvest, interrupted, toy_spec

from sae_granary import open_cache
from sae_granary.cache.errors import (
    CacheError,
    CorruptCacheError,
    MissingFileError,
    NotACacheError,
    UnsupportedFormatError,
)
from sae_granary.cache.format.signed import load_signed
from sae_granary.cache.read.verify import verify


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "whole"
    harvest(path, toy_spec(hooks=("layer_1",)), n_buffers=4)
    return path


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    return interrupted(tmp_path_factory.mktemp("damage") / "unfinished", toy_spec(hooks=("layer_1",)), after=130)


@pytest.fixture
def damaged(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


def _outcome(path):
    """What a user is told: the error at open or the problems that verify finds; None for neither."""
    try:
        open_cache(path, allow_incomplete=True)
    except CacheError as error:
        return str(error)
    report = verify(path)
    return None if report.ok else "; ".join(f"{f.path}: {f.problem}" for f in report.problems)


def test_the_undamaged_ones_are_found_good(whole, unfinished):
    assert _outcome(whole) is None
    assert _outcome(unfinished) is None


@pytest.mark.parametrize("name", ["manifest.json", "commits/00000001.json"])
def test_truncated_at_every_byte_it_is_refused(whole, unfinished, tmp_path, name):
    for source in (whole, unfinished):
        path = Path(shutil.copytree(source, tmp_path / source.name))
        data = (source / name).read_bytes()
        for n_bytes in range(len(data)):
            with pytest.raises(CorruptCacheError, match=r"not valid JSON|checksum"):
                load_signed(path / name, data[:n_bytes])
        for n_bytes in range(0, len(data), 61):
            (path / name).write_bytes(data[:n_bytes])
            with pytest.raises(CorruptCacheError, match=r"not valid JSON|checksum|has [\d,]+ bytes, expected"):
                open_cache(path, allow_incomplete=True)
        (path / name).write_bytes(data)
        assert _outcome(path) is None


def _mutate(path, chance):
    """One random damage to one random file; returns what it was."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    file = chance.choice(files)
    data = bytearray(file.read_bytes())
    at = chance.randrange(len(data))
    kind = chance.choice(["flip", "flip", "flip", "truncate", "delete", "append", "zero", "swap", "empty"])
    if kind == "flip":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "truncate":
        del data[at:]
    elif kind == "append":
        data += bytes([chance.randrange(256)])
    elif kind == "zero":
        end = min(len(data), at + 16)
        if not any(data[at:end]):
            data[at] ^= 0xFF
        else:
            data[at:end] = bytes(end - at)
    elif kind == "empty":
        data.clear()
    if kind == "delete":
        file.unlink()
    elif kind == "swap":  # the content of another file
        others = [p for p in files if p.read_bytes() != bytes(data)]
        file.write_bytes(chance.choice(others).read_bytes())
    else:
        file.write_bytes(bytes(data))
    return kind, file


def test_of_200_random_damages_none_is_silent(whole, tmp_path):
    chance, path = random.Random(0), Path(shutil.copytree(whole, tmp_path / "damaged"))
    kinds = set()
    for i in range(200):
        kind, file = _mutate(path, chance)
        kinds.add((kind, file.suffix))
        name = str(file.relative_to(path))
        said = _outcome(path)
        assert said is not None, (i, kind, name)
        assert Path(name).name in said, (kind, name, said)
        file.unlink(missing_ok=True)
        file.write_bytes((whole / name).read_bytes())
    assert len(kinds) > 20
    assert _outcome(path) is None


def test_of_random_damages_to_an_unfinished_cache_none_is_silent(unfinished, tmp_path):
    chance, path = random.Random(1), Path(shutil.copytree(unfinished, tmp_path / "damaged"))
    for i in range(100):
        kind, file = _mutate(path, chance)
        name = str(file.relative_to(path))
        # Metadata for Zarr is not yet covered by a checksum: a damage that leaves it the same JSON is none.
        # Without its last record an unfinished cache is a shorter one, as good as before it was committed.
        harmless = name.endswith("zarr.json") or (kind == "delete" and name.startswith("commits/"))
        assert _outcome(path) is not None or harmless, (i, kind, name)
        file.unlink(missing_ok=True)
        file.write_bytes((unfinished / name).read_bytes())


FIELDS = ["complete", "unit", "dtype", "rows_per_shard", "hook_points", "provenance", "shards", "statistics", "zarr"]
VALID = [("provenance", {}), ("zarr", {}), ("complete", True)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in FIELDS
        for value in (None, -1, True, "x", 1.5, [], {}, 2**70)
        if (field, value) not in VALID
    ],
)
def test_a_field_of_another_type_or_range_is_one_clear_error(damaged, field, value):
    edit_signed(damaged / "manifest.json", lambda body: body.update({field: value}))
    with pytest.raises(CorruptCacheError, match=rf"manifest.json.*{field}"):
        open_cache(damaged)


def _set(*keys, value):
    def change(body):
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("hook_points", 0, "name", value="../../etc"), "it names a folder"),
        (_set("hook_points", 0, "name", value="/etc"), "it names a folder"),
        (_set("hook_points", 0, "d_in", value=10**12), "d_in is 1000000000000"),
        (_set("shards", 0, "n_rows", value=10**9), "the rows of a shard"),
        (_set("shards", 0, "n_rows", value=0), "n_rows is 0"),
        (_set("shards", 0, "n_rows", value=1), "bytes for 1 rows"),
        (_set("shards", 0, "shard", value=5), "files are not those of shard 5"),
        (_set("shards", 0, "files", "../../etc/passwd", value={"bytes": 1, "xxh3": ""}), "files are not those"),
        (_set("shards", 0, "cursor", "source", value={"x": "y"}), "x is 'y', expected int"),
        (_set("statistics", "layer_1", "mean", value="no base64!"), "mean is not base64"),
        (_set("statistics", "layer_1", "mean", value="AAAAAAAA8D8="), "differ in length"),
        (_set("rows_per_shard", value=2**40), "rows_per_shard"),
    ],
)
def test_hostile_values_are_refused_even_when_signed(damaged, change, message):
    edit_signed(damaged / "manifest.json", change)
    with pytest.raises(CorruptCacheError, match=message):
        open_cache(damaged)


def test_a_wrong_record_that_is_signed_is_found_by_verify(damaged):
    edit_signed(damaged / "commits/00000000.json", _set("windows", "last", value=99))
    said = _outcome(damaged)
    assert "commits/00000000.json" in said


def test_statistics_that_do_not_fit_the_rows_are_found_by_verify(whole, unfinished, tmp_path):
    path = Path(shutil.copytree(unfinished, tmp_path / "unfinished"))
    body = json.loads((path / "commits/00000001.json").read_bytes())["statistics"]
    edit_signed(path / "commits/00000000.json", _set("statistics", "layer_1", "mean", value=body["layer_1"]["mean"]))
    assert "statistics of layer_1 do not fit its rows" in _outcome(path)


def test_another_format_and_another_version_are_refused_by_number(damaged):
    file = damaged / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"version": 1', '"version": 5'))
    with pytest.raises(UnsupportedFormatError, match="cache format 5; this version reads formats 1 to 4: update"):
        open_cache(damaged)
    file.write_text(text.replace("granary-activations", "granary-weights"))
    with pytest.raises(NotACacheError, match="format is 'granary-weights', expected 'granary-activations'"):
        open_cache(damaged)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "[" * 100_000, '{"format": NaN}', '{"a": 1, "a": 2}', "\xff", "9" * 10_000, '{"a": ']
)
def test_what_is_not_our_json_is_no_traceback(damaged, text):
    (damaged / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptCacheError, match=r"manifest.json"):
        open_cache(damaged)


def test_a_missing_and_a_short_shard_are_named_at_open(damaged):
    shard = damaged / "activations/layer_1/c.1.0"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(CorruptCacheError, match=rf"c.1.0 has {len(data) - 1:,} bytes, expected {len(data):,}"):
        open_cache(damaged)
    open_cache(damaged, shards=[0])  # only what is opened is checked
    shard.unlink()
    with pytest.raises(MissingFileError, match=r"c.1.0 is missing; restore it"):
        open_cache(damaged)
    shard.mkdir()
    with pytest.raises(CorruptCacheError, match="not a regular file"):
        open_cache(damaged)


@pytest.mark.parametrize(
    "name", ["activations/layer_1/c.0.0", "manifest.json", "vocabulary.json", "rows", "rows/flags"]
)
def test_links_are_not_followed(damaged, whole, name):
    target = damaged / name
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    target.symlink_to(whole / name)
    with pytest.raises(CorruptCacheError, match="link"):
        open_cache(damaged)


def test_a_shard_that_changes_after_open_is_an_error_and_not_a_crash(damaged):
    opened = open_cache(damaged)
    (damaged / "activations/layer_1/c.0.0").write_bytes(b"")
    with pytest.raises(CorruptCacheError, match="has changed its size"):
        opened.hook()[0:3]
    os.unlink(damaged / "norms/layer_1/c.0")
    with pytest.raises(MissingFileError, match="has gone"):
        opened.norms()[0]


def test_verify_names_each_damaged_file_and_foreign_ones(damaged):
    for name in ("rows/flags/c.0", "activations/layer_1/c.1.0"):
        flip(damaged / name, 3)
    (damaged / "notes.txt").write_text("mine")
    report = verify(damaged)
    assert {finding.path for finding in report.problems} == {"rows/flags/c.0", "activations/layer_1/c.1.0"}
    assert all("checksum is" in str(finding.problem) for finding in report.problems)
    assert report.foreign == ("notes.txt",)
    assert verify(damaged, quick=True).ok
