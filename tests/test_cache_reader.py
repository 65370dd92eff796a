"""Reading a cache: indexing, documents, contexts, statistics, what `repr` says, and what is imported."""

import html.parser
import os

import numpy as np
import pytest
import torch
from cache_kit import WORDS, harvest, interrupted, toy_rows, toy_spec, tree
from command_kit import run_python
from hypothesis import given
from hypothesis import strategies as st

from sae_granary import open_cache
from sae_granary.cache.errors import IncompleteCacheError, NotACacheError, RowLookupError, UnknownNameError
from sae_granary.cache.format.stats import QUANTILES, block_moments, merge_all, quantiles
from sae_granary.cache.read.context import join_tokens
from sae_granary.cache.read.verify import verify


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "toy"
    harvest(path)
    return path


@pytest.fixture(scope="module")
def opened(path):
    return open_cache(path)


@pytest.fixture(scope="module")
def rows():
    return toy_rows()


N_ROWS = toy_rows().n_rows
ROW = st.integers(-N_ROWS, N_ROWS - 1)
BOUND = st.none() | st.integers(-N_ROWS - 5, N_ROWS + 5)


@given(BOUND, BOUND, st.sampled_from([None, 1, 2, 7, -1, -3]))
def test_a_slice_is_numpys(opened, rows, start, stop, step):
    expected = rows.doc_id[start:stop:step]
    assert (opened.column("doc_id")[start:stop:step] == expected).all()
    values = opened.hook("layer_1")[start:stop:step]
    assert values.shape == (len(expected), 8)
    assert (values == rows.activations["layer_1"].astype(values.dtype)[start:stop:step]).all()


@given(st.lists(ROW, max_size=30))
def test_an_index_array_is_numpys(opened, rows, index):
    values = opened.hook("layer_3")[np.array(index, dtype=np.int64)]
    assert (values == rows.activations["layer_3"].astype(values.dtype)[np.array(index, dtype=np.int64)]).all()
    assert opened.column("window")[index].tolist() == rows.window[np.array(index, dtype=np.int64)].tolist()


@given(ROW)
def test_one_row_is_numpys(opened, rows, row):
    assert opened.column("token_id")[row] == rows.token_id[row]
    assert (opened.hook("layer_1")[row] == rows.activations["layer_1"].astype(opened.hook("layer_1").dtype)[row]).all()


def test_indices_out_of_range_and_of_another_type(opened):
    for bad in (N_ROWS, -N_ROWS - 1):
        with pytest.raises(IndexError, match=f"out of range: there are {N_ROWS} rows"):
            opened.column("flags")[bad]
        with pytest.raises(IndexError, match="out of range"):
            opened.column("flags")[[0, bad]]
    with pytest.raises(IndexError, match="one-dimensional array of integers"):
        opened.column("flags")[np.array([0.5])]


def test_a_slice_inside_a_shard_is_a_view_of_the_map(opened):
    view = opened.hook("layer_1")[2:9]
    assert np.shares_memory(view, opened.hook("layer_1").shard(0))
    assert not view.flags.writeable
    assert isinstance(opened.hook("layer_1").shard(0), np.memmap)
    assert opened.hook("layer_1").shard(1).shape == (opened.shards[1].n_rows, 8)


def test_row_ids_are_permanent(opened, path):
    ids = opened.row_ids(np.arange(len(opened)))
    assert len(np.unique(ids)) == len(opened)
    assert (np.diff(ids) >= 1).all()
    part = open_cache(path, shards=[2, 1])
    assert [shard.index for shard in part.shards] == [1, 2]
    assert part.shards[0].first_row_id == opened.manifest.rows_per_shard
    first = opened.shards[0].n_rows
    assert (part.row_ids(np.arange(len(part))) == ids[first : first + len(part)]).all()
    assert (part.hook("layer_1")[:] == opened.hook("layer_1")[first : first + len(part)]).all()


def test_every_row_has_its_document_token_and_context(opened, rows):
    for row in range(0, len(opened), 5):
        doc_id = int(rows.doc_id[row])
        assert opened.document(row).text == f"document {doc_id} says ünïcode"
        assert opened.token(row) == WORDS[rows.token_id[row]]
        context = opened.context(row, before=3, after=2)
        assert context.tokens[context.index] == opened.token(row)
        assert context.rows[context.index] == row
        assert len(context.tokens) <= 6
        for other in context.rows:
            assert rows.doc_id[other] == doc_id
            assert other == row or not rows.flags[other] & 1
        assert context.document == opened.document(row)
    assert opened.context(-1).row == len(opened) - 1


def test_a_document_that_starts_in_another_shard_is_found(path):
    later = open_cache(path, shards=[1])
    first = later.document(0)
    assert first.doc_id == int(later.column("doc_id")[0])


def test_without_a_vocabulary_tokens_are_ids(tmp_path):
    harvest(tmp_path / "toy", toy_spec(vocabulary=None))
    opened = open_cache(tmp_path / "toy")
    assert opened.token(0) == 1
    assert all(isinstance(token, int) for token in opened.context(3).tokens)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([], ""),
        (["hello", "##s", "world"], "hellos world"),
        (["##s", "world"], "s world"),
        (["\u2581Hello", "s", "\u2581world"], "Hellos world"),
        (["Hello", "\u0120world", "\u010a"], "Hello world"),
        (["\u0120caf", "\u00c3\u00a9"], "café"),
        (["\u0120a", "<|endoftext|>", "\u4e2d"], "a<|endoftext|>中"),
        ([5, 6], "5 6"),
    ],
)
def test_tokens_are_joined_as_their_tokenizer_splits(tokens, text):
    assert join_tokens(tokens) == text


@given(st.lists(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=20), min_size=1, max_size=4))
def test_quantiles_are_order_statistics(shards):
    arrays = [np.array(shard, dtype=np.float32) for shard in shards]
    ordered = np.sort(np.concatenate(arrays))
    found = quantiles(lambda: arrays)
    assert found == {q: float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 100))
def test_moments_merge_to_those_of_all_rows(sizes, seed):
    values = np.random.default_rng(seed).normal(3, 2, size=(sum(sizes), 5)).astype(np.float32)
    merged = merge_all(block_moments(part)[0] for part in np.split(values, np.cumsum(sizes)[:-1]))
    exact = values.astype(np.float64)
    assert merged.n_rows == len(values)
    np.testing.assert_allclose(merged.mean_D, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.m2_D, exact.var(axis=0) * len(values), rtol=1e-9, atol=1e-12)


def test_statistics_are_those_of_the_stored_rows(opened, path):
    for view in (opened, open_cache(path, shards=[0, 2])):
        exact = view.hook("layer_3")[:].astype(np.float64)
        stats = view.stats("layer_3")
        assert stats.n_rows == len(view)
        np.testing.assert_allclose(stats.mean, exact.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats.var, exact.var(axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats.mean_sq_norm, (exact**2).sum(axis=1).mean(), rtol=1e-12)
        np.testing.assert_allclose(stats.total_variance, exact.var(axis=0).sum(), rtol=1e-12)
        norms = np.sort(view.norms("layer_3")[:])
        assert stats.norm_quantiles[0.5] == norms[round(0.5 * (len(norms) - 1))]
        assert stats.norm_quantiles[1.0] == norms[-1]
    with pytest.raises(RowLookupError, match="no rows, so no statistics"):
        open_cache(path, shards=[]).stats("layer_1")


def test_names_that_are_not_there(opened, path):
    with pytest.raises(UnknownNameError, match="no hook point 'layer_2': there are layer_1, layer_3"):
        opened.hook("layer_2")
    with pytest.raises(UnknownNameError, match="name a hook point: there are layer_1, layer_3"):
        opened.hook()
    with pytest.raises(UnknownNameError, match="no column 'doc': there are token_id, doc_id"):
        opened.column("doc")
    with pytest.raises(UnknownNameError, match="has no shard 99: there are"):
        open_cache(path, shards=[99])


def test_what_is_no_cache_says_so(tmp_path):
    with pytest.raises(NotACacheError, match="does not exist; `sae-harvest run --out"):
        open_cache(tmp_path / "none")
    with pytest.raises(NotACacheError, match=r"is not an activation cache: it has no manifest.json"):
        open_cache(tmp_path)


def test_an_incomplete_cache_says_what_is_there_and_how_to_finish_it(tmp_path):
    interrupted(tmp_path / "toy", after=130)
    n_rows = len(open_cache(tmp_path / "toy", allow_incomplete=True))
    message = rf"is incomplete: {n_rows} rows in 2 committed shards; run the same `sae-harvest run \.\.\. --out .*toy`"
    with pytest.raises(IncompleteCacheError, match=message):
        open_cache(tmp_path / "toy")
    part = open_cache(tmp_path / "toy", allow_incomplete=True)
    assert "incomplete" in repr(part)
    assert part.stats("layer_1").n_rows == n_rows


def test_repr_and_html_show_the_facts_and_escape_them(tmp_path):
    hostile = "<script>alert(1)</script>"
    harvest(tmp_path / "toy", toy_spec(provenance={"model": {"id": hostile, "revision": "0123456789abcdef"}}))
    opened = open_cache(tmp_path / "toy")
    text = repr(opened)
    for shown in ("complete, format 1", f"{len(opened):,} (one per token)", "layer_1 (d_in 8)", "bfloat16"):
        assert shown in text
    assert f"{hostile} @ 0123456789ab" in text
    page = opened._repr_html_()
    assert "<script" not in page
    html.parser.HTMLParser().feed(page)
    assert repr(opened.hook("layer_1")).startswith("<HookRows activations/layer_1")
    assert repr(opened.column("flags")).startswith("<Column rows/flags")


def test_reading_writes_nothing(path):
    before = tree(path)
    mtimes = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    opened = open_cache(path)
    opened.stats("layer_1")
    opened.context(5)
    verify(path)
    repr(opened)
    assert tree(path) == before
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == mtimes


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user")
def test_a_read_only_cache_of_another_user(tmp_path):
    harvest(tmp_path / "toy")
    for item in [tmp_path / "toy", *(tmp_path / "toy").rglob("*")]:
        item.chmod(0o555 if item.is_dir() else 0o444)
    run_python(
        """
import os, sys
from pathlib import Path
from sae_granary import open_cache
from sae_granary.cache.load.loader import Loader
from sae_granary.cache.read.verify import verify
from cache_kit import harvest
def batch():
    with Loader(open_cache("."), batch_size=8) as loader:
        return next(loader)
os.chdir(sys.argv[1])
open_cache(".").stats("layer_1"), verify("."), batch()  # the other user may not be able to import
os.setuid(65534)
try:
    open("x", "w")
except PermissionError:
    pass
else:
    raise SystemExit("not read-only")
assert len(open_cache(".")) > 0 and open_cache(".").stats("layer_1").n_rows
assert verify(".").ok and batch().n_rows == 8
harvest(Path("."))  # complete: does nothing, not even a lock
""",
        tmp_path / "toy",
    )


def test_reading_imports_neither_zarr_nor_torch_and_the_package_not_even_numpy(path):
    run_python(
        """
import sys
import sae_granary, sae_granary.cache.cli
heavy = {"numpy", "zarr", "torch", "pyarrow", "rich.console", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
opened = sae_granary.open_cache(sys.argv[1])
opened.hook("layer_1")[:3], opened.stats("layer_1"), opened.context(4), repr(opened)
from sae_granary.cache.read.verify import verify
assert verify(sys.argv[1]).ok
assert not {"zarr", "torch", "transformers"} & set(sys.modules)
""",
        path,
    )


def test_documents_are_written_without_pandas_and_read_back(tmp_path):
    run_python(
        """
import sys
from pathlib import Path
from sae_granary.cache.format.documents import DocumentFile, read_document
from sae_granary.common.rows import DocumentRow
path = Path(sys.argv[1])
documents = [DocumentRow(7, "a.txt", 0, ""), DocumentRow(9, "ü", 2**40, "Größe ∞"), DocumentRow(2**40, "a", 1, "x")]
file = DocumentFile(path)
file.append(documents)
file.finish()
assert "pandas" not in sys.modules
assert [read_document(path, document.doc_id) for document in documents] == documents
""",
        tmp_path / "documents",
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_as_tensors(make_cache, dtype: str) -> None:
    opened = open_cache(make_cache(n_docs=12, dtype=dtype, rows_per_shard=100))
    for rows in (slice(90, 120), slice(None), [3, 101, 3], np.array([5])):  # within a shard and across two
        tensor = opened.tensor(rows)
        assert tensor.dtype == getattr(torch, dtype)
        assert np.array_equal(tensor.float().numpy(), opened.hook()[rows].astype(np.float32))
    tensor = opened.tensor(slice(0, 2), hook="layer_3")
    tensor.zero_()  # a copy: the cache is read-only
    assert opened.hook()[:2].any()
    with pytest.raises(UnknownNameError, match="no hook point 'layer_9'"):
        opened.tensor(slice(0, 2), hook="layer_9")
