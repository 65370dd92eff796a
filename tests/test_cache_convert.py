"""`sae-cache convert`: the same rows, documents and positions in another dtype; continued, verified, refused."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
from cache_kit import DTYPES, flip, harvest, toy_rows, toy_spec, tree
from cache_kit import run_cache as run
from command_kit import refused

from sae_granary import open_cache
from sae_granary.cache import convert as conversion
from sae_granary.cache.cli import app
from sae_granary.cache.convert import convert
from sae_granary.cache.format.layout import COLUMNS
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write import writer as writing

SPEC = {"rows_per_shard": 400, "kept_columns": ()}  # a first shard that is enough to fit steps and offsets to
N_BUFFERS = 14


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "float32"
    harvest(path, toy_spec("float32", **SPEC), N_BUFFERS)
    return path


def same_rows(made, opened):
    for name in COLUMNS:
        assert (made.column(name)[:] == opened.column(name)[:]).all()
    assert (made.row_ids(np.arange(len(made))) == opened.row_ids(np.arange(len(opened)))).all()
    assert made.document_ids() == opened.document_ids()
    for doc_id in opened.document_ids():
        assert made.find_document(doc_id) == opened.find_document(doc_id)
    assert made.vocabulary == opened.vocabulary
    assert made.manifest.summary == opened.manifest.summary
    assert [record.cursor for record in made.records] == [record.cursor for record in opened.records]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_it_holds_the_same_rows_and_documents(source, tmp_path, dtype):
    opened, exact = open_cache(source), toy_rows(N_BUFFERS)
    assert len(opened.shards) > 2
    told = run("convert", source, tmp_path / dtype, "--dtype", dtype).output
    assert "rounded from float32" in told
    assert ("storage FVU layer_1" in told) == (dtype == "int8")
    made = open_cache(tmp_path / dtype)
    assert made.dtype == dtype
    assert verify(made.path).ok
    same_rows(made, opened)
    for hook, values in exact.activations.items():
        if dtype == "int8":
            np.testing.assert_allclose(made.hook(hook)[:], values, atol=0.02 * np.abs(values).max())
        else:
            assert made.hook(hook)[:].tobytes() == values.astype(DTYPES[dtype]).tobytes()
    again = convert(tmp_path / dtype, tmp_path / "again", "float32")  # every value of a narrower dtype is a float32
    assert again.manifest.fingerprint["converted_from"] == f"float32, {dtype}"
    assert (again.hook("layer_3")[:] == made.hook("layer_3")[:].astype(np.float32)).all()
    told = run("convert", tmp_path / dtype, tmp_path / "again", "--dtype", "float32").output
    assert "exactly from" in told  # complete already


def test_codes_are_those_of_a_harvest_in_int8(tmp_path):
    """Steps and offsets are fitted to the same rows: the first 8,192, here all of one buffer."""
    rows = toy_rows(N_BUFFERS)
    for dtype in ("float32", "int8"):
        with writing.CacheWriter.open(tmp_path / dtype, toy_spec(dtype, rows_per_shard=2048)) as writer:
            writer.begin_buffer({"buffer": 0})
            writer.append(rows)
            writer.finish({})
    convert(tmp_path / "float32", tmp_path / "made", "int8")
    made, harvested = tree(tmp_path / "made"), tree(tmp_path / "int8")
    told = {"manifest.json"}  # from what it was converted
    assert {name for name in made if made[name] != harvested.get(name)} == told


def test_an_interrupted_conversion_continues_to_equal_bytes(source, tmp_path):
    convert(source, tmp_path / "whole", "int8")
    for n_blocks in range(3):
        path = tmp_path / str(n_blocks)
        left = iter(range(n_blocks))

        def stop(done, total, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(source, path, "int8", progress=stop)
        convert(source, path, "int8")
        assert tree(path) == tree(tmp_path / "whole")


def test_blocks_are_whole_windows_and_bounded(source, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_ROWS", 50)
    opened = open_cache(source)
    for record in opened.records:
        blocks = list(conversion._blocks(opened, record))
        assert max(rows.n_rows for rows, _ in blocks) < 50 + 12  # and the rest of a window
        assert sum(rows.n_rows for rows, _ in blocks) == record.n_rows
        assert sum(len(documents) for _, documents in blocks) == record.documents.n
        for (before, _), (after, _) in pairwise(blocks):
            assert before.window[-1] < after.window[0]


def test_what_cannot_be_converted_is_refused_in_a_line(source, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    flip(damaged / "activations" / "layer_1" / "c.1.0")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    for args, message in [
        ((source, tmp_path / "a", "--dtype", "int4"), "dtype is 'int4', expected one of float32"),
        ((source, tmp_path / "a", "--dtype", "float32"), "is stored as float32 already"),
        ((source, source, "--dtype", "int8"), "is the cache itself; give another folder"),
        ((tmp_path / "none", tmp_path / "a", "--dtype", "int8"), "none does not exist"),
        ((damaged, tmp_path / "d", "--dtype", "int8"), "c.1.0: its checksum does not fit: restore it from a copy"),
        ((source, tmp_path / "other", "--dtype", "int8"), "holds something that is not a cache (notes.txt)"),
    ]:
        assert message in refused(app, "convert", *args)
    assert not (tmp_path / "a").exists()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    assert len(open_cache(tmp_path / "d", allow_incomplete=True).records) == 1  # what was sound is there
    shutil.rmtree(damaged)
    shutil.copytree(source, damaged)  # restored: the same command continues
    run("convert", damaged, tmp_path / "d", "--dtype", "int8")


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_a_cache_that_was_extended_is_converted_further(tmp_path, dtype):
    """The steps and offsets of its first shard stay; an extended int8 cache reads them back."""
    source = tmp_path / "source"
    before = "float32" if dtype == "int8" else "int8"

    def append(rows, number, **options):
        with writing.CacheWriter.open(source, toy_spec(before, **SPEC), **options) as writer:
            writer.begin_buffer({"buffer": number})
            writer.append(rows)
            writer.finish({"rows": writer.n_rows})

    rows = toy_rows(N_BUFFERS)
    cut = int(np.flatnonzero(rows.position == 0)[60])
    append(rows[:cut], 0)
    n_shards = len(convert(source, tmp_path / "made", dtype).records)
    first = tree(tmp_path / "made")
    affines = open_cache(source).manifest.affines
    append(rows[cut:], 1, extend=True)
    assert verify(source).ok
    grown = open_cache(source)
    assert len(grown.records) > n_shards
    if before == "int8":
        assert all(grown.manifest.affines[hook].equals(affine) for hook, affine in affines.items())
    made = convert(source, tmp_path / "made", dtype)
    assert (len(made), len(made.records)) == (rows.n_rows, len(grown.records))
    after = tree(tmp_path / "made")
    assert all(after[name] == first[name] for name in first if name.endswith((".0", ".parquet")))
    np.testing.assert_allclose(made.hook("layer_1")[:], rows.activations["layer_1"], atol=0.1)
