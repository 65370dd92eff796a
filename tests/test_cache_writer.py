"""What the writer accepts and refuses, and where rows are split over shards."""

from dataclasses import replace

import numpy as np
import pytest
from cache_kit import harvest, make_rows, toy_buffer, toy_rows, toy_spec, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_granary import open_cache
from sae_granary.cache.errors import BadActivationError, BadRowsError, CacheError, SpecError
from sae_granary.cache.format.layout import cache_layout, default_rows_per_shard, inner_rows
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.format.stats import block_moments
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write.split import split_windows
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.rows import DocumentRow, HookPoint, InvalidHookPointError


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(0, 24), st.integers(20, 24))
def test_rows_are_split_at_window_boundaries_only(lengths, used, rows_per_shard):
    used = min(used, rows_per_shard)
    parts = list(split_windows(lengths, used, rows_per_shard))
    ends = {0, *np.cumsum(lengths).tolist()}
    assert sum(parts) == sum(lengths)
    assert set(np.cumsum(parts).tolist()) <= ends
    assert all(part > 0 for part in parts[1:])
    room, start = rows_per_shard - used, 0
    for i, part in enumerate(parts):
        assert part <= room
        start += part
        if i + 1 < len(parts):  # the next window did not fit: no shard is shorter than it must be
            following = min(end for end in ends if end > start) - start
            assert part + following > room
        room = rows_per_shard


@given(st.integers(1, 5000), st.integers(1, 10_000), st.integers(1, 1 << 20))
def test_an_inner_chunk_is_whole_rows_that_divide_the_shard(rows_per_shard, row_bytes, wanted):
    rows = inner_rows(rows_per_shard, row_bytes, wanted)
    assert rows_per_shard % rows == 0
    assert rows == 1 or rows * row_bytes <= 4 * max(wanted, row_bytes)


def test_the_default_shard_has_chunks_of_one_mebibyte():
    rows = default_rows_per_shard(768, "bfloat16")
    layout = cache_layout([HookPoint("layer_6", "x", "output", 0, 768)], "bfloat16", rows)
    array = layout.activations["layer_6"]
    assert rows == 131072
    assert 128 << 20 <= rows * array.row_bytes <= 256 << 20
    assert (1 << 19) <= array.inner_rows * array.row_bytes <= (1 << 21)
    assert layout.bytes_of(rows + 1) > layout.bytes_of(rows) > rows * array.row_bytes


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_the_bytes_do_not_depend_on_the_size_of_the_calls(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("calls")
    spec = toy_spec(hooks=("layer_1",))
    rows, documents = toy_rows(3, hooks=("layer_1",)), [d for i in range(3) for d in toy_buffer(i)[1]]
    ends = np.cumsum(np.unique(rows.window, return_counts=True)[1]).tolist()
    cuts = sorted(data.draw(st.sets(st.sampled_from(ends[:-1]))))
    for name, at in (("one", []), ("many", cuts)):
        with CacheWriter.open(root / name, spec) as writer:
            writer.begin_buffer({})
            for start, stop in zip([0, *at], [*at, rows.n_rows], strict=True):
                part = rows[start:stop]
                writer.append(part, [d for d in documents if d.doc_id in part.doc_id])  # some of them twice
            writer.finish({})
    assert tree(root / "one") == tree(root / "many")


def _one_window(values, hook="layer_1", doc_id=7):
    numbers = np.arange(len(values))
    columns = {"token_id": numbers, "position": numbers, "doc_position": numbers}
    return make_rows({hook: values}, doc_id=np.full(len(values), doc_id), **columns)


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        ("float32", np.nan, "hook point 'layer_1', document 7, row 69: value nan; check the model's compute dtype"),
        ("bfloat16", np.inf, "row 69: value inf"),
        ("bfloat16", -np.inf, "row 69: value -inf"),
        ("float16", 70000.0, r"value 70000.0 is out of the range of float16; store a wider dtype"),
        ("bfloat16", 3.4e38, "is out of the range of bfloat16"),
    ],
)
def test_a_value_that_cannot_be_stored_stops_with_hook_document_and_row(tmp_path, dtype, value, message):
    bad = np.ones((20, 8), np.float32)
    bad[5, 3] = value
    second = replace(_one_window(bad), window=np.ones(20, np.uint64))
    with CacheWriter.open(tmp_path / "toy", toy_spec(dtype, hooks=("layer_1",))) as writer:
        writer.begin_buffer({})
        writer.append(_one_window(np.ones((64, 8), np.float32)))  # fills a shard
        with pytest.raises(BadActivationError, match=message):
            writer.append(second)
    assert [shard.n_rows for shard in open_cache(tmp_path / "toy", allow_incomplete=True).shards] == [64]
    assert verify(tmp_path / "toy").ok


def test_the_largest_float16_is_stored(tmp_path):
    values = np.full((4, 8), 65504.0, np.float32)
    with CacheWriter.open(tmp_path / "toy", toy_spec("float16", hooks=("layer_1",))) as writer:
        writer.begin_buffer({})
        writer.append(_one_window(values))
        writer.finish({})
    assert (open_cache(tmp_path / "toy").hook()[:] == values).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": {"layer_2": np.ones((4, 8), np.float32)}}, r"hook points are \['layer_2'\], expected"),
        ({"activations": {"layer_1": np.ones((4, 9), np.float32)}}, r"float32\(4, 9\), expected \(4, 8\)"),
        ({"activations": {"layer_1": np.ones((4, 8), np.int64)}}, "int64"),
        ({"token_id": np.zeros(3, np.int32)}, r"token_id is int32\(3,\), expected int32\(4,\)"),
        ({"token_id": np.zeros(4)}, "token_id is float64"),
        ({"token_id": np.full(4, 2**40)}, "token_id holds 1099511627776 .* out of the range of int32"),
        ({"window": np.array([3, 2, 2, 2], np.uint64)}, "windows are not in source order"),
        ({"flags": np.full(4, 0x80, np.uint8)}, "marks absent rows"),
    ],
)
def test_rows_that_break_the_contract_are_refused(tmp_path, change, message):
    rows = replace(_one_window(np.ones((4, 8), np.float32)), **change)
    with CacheWriter.open(tmp_path / "toy", toy_spec(hooks=("layer_1",))) as writer:
        writer.begin_buffer({})
        with pytest.raises(BadRowsError, match=message):
            writer.append(rows)
        with pytest.raises(BadRowsError, match="stopped at an error"):
            writer.append(_one_window(np.ones((4, 8), np.float32)))


def test_a_window_is_appended_once_and_fits_a_shard(tmp_path):
    rows = _one_window(np.ones((4, 8), np.float32))
    with CacheWriter.open(tmp_path / "toy", toy_spec(hooks=("layer_1",))) as writer:
        with pytest.raises(BadRowsError, match="before begin_buffer"):
            writer.append(rows)
        writer.begin_buffer({})
        writer.append(rows)
        with pytest.raises(BadRowsError, match="window 0 comes after window 0"):
            writer.append(rows)
    with CacheWriter.open(tmp_path / "toy", toy_spec(hooks=("layer_1",), rows_per_shard=3)) as writer:
        writer.begin_buffer({})
        with pytest.raises(BadRowsError, match="a window of 4 rows cannot fit a shard of 3"):
            writer.append(rows)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([DocumentRow(8, "x", 8, "t")], "document 8 has no row among those appended"),
        ([DocumentRow(7, "x", 7, "t"), DocumentRow(7, "x", 7, "t")], "doc_id must ascend"),
        ([DocumentRow(7, "x", 7, "lone \ud800 surrogate")], "document 7 of x: not Unicode"),
    ],
)
def test_documents_that_cannot_be_traced_are_refused(tmp_path, documents, message):
    with CacheWriter.open(tmp_path / "toy", toy_spec(hooks=("layer_1",))) as writer:
        writer.begin_buffer({})
        with pytest.raises(BadRowsError, match=message):
            writer.append(_one_window(np.ones((4, 8), np.float32)), documents)


def test_a_finished_harvest_takes_no_rows_and_an_empty_one_is_not_written(tmp_path):
    harvest(tmp_path / "toy")
    with CacheWriter.open(tmp_path / "toy", toy_spec()) as writer:
        assert writer.complete
        assert writer.n_rows == toy_rows().n_rows
        writer.begin_buffer({})
        with pytest.raises(BadRowsError, match="is complete"):
            writer.append(*toy_buffer(9))
        writer.finish({})
    with (
        pytest.raises(CacheError, match="no rows were harvested"),
        CacheWriter.open(tmp_path / "none", toy_spec()) as writer,
    ):
        writer.finish({})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "word"}, "unit is 'word', expected one of token, text"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"hook_points": ()}, "at least one hook point"),
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"hook_points": (HookPoint("a", "a", "output", None, 4), HookPoint("A", "b", "output", None, 4))}, "differ"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        toy_spec(**change)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc", "a/b", ".hidden", "a b", "é", "x" * 300, "a\n"])
def test_a_hook_point_name_is_a_safe_folder_name(name):
    with pytest.raises(InvalidHookPointError, match="it names a folder"):
        HookPoint(name, "x", "output", None, 4)


def test_provenance_must_be_json(tmp_path):
    for bad in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises(SpecError, match="must be JSON"):
            CacheWriter.open(tmp_path / "toy", toy_spec(provenance=bad))
    assert not (tmp_path / "toy").exists()


def test_pooled_texts_have_a_row_each(tmp_path):
    hook = HookPoint("pooled", "", "output", None, 4)
    n = 150
    spec = CacheSpec("text", (hook,), "float32", 64, {}, {})
    number = np.arange(n)
    values = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
    rows = make_rows({"pooled": values}, token_id=np.full(n, -1), doc_id=number, window=number)
    with CacheWriter.open(tmp_path / "toy", spec) as writer:
        writer.begin_buffer({})
        writer.append(rows, [DocumentRow(i, "x", i, f"text {i}") for i in range(n)])
        writer.finish({})
    opened = open_cache(tmp_path / "toy")
    assert [shard.n_rows for shard in opened.shards] == [64, 64, 22]
    assert opened.document(100).text == "text 100"
    assert opened.context(100).text == "text 100"
    with pytest.raises(LookupError, match="a row is a whole text"):
        opened.token(100)
    assert verify(tmp_path / "toy").ok


def test_many_documents_are_cut_into_row_groups_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr("sae_granary.cache.format.documents.GROUP_DOCUMENTS", 3)
    harvest(tmp_path / "toy")
    opened = open_cache(tmp_path / "toy")
    for row in range(0, len(opened), 7):
        doc_id = int(opened.column("doc_id")[row])
        assert opened.document(row) == DocumentRow(doc_id, "toy.txt", doc_id, f"document {doc_id} says ünïcode")
    assert opened.find_document(1) is None
    assert opened.find_document(10**6) is None


def test_norms_and_moments_of_a_block_by_hand():
    moments, norms = block_moments(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    assert norms.tolist() == [5.0, 0.0]
    assert moments.mean_D.tolist() == [1.5, 2.0]
    assert moments.m2_D.tolist() == [4.5, 8.0]
