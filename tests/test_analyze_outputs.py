"""`sae-analyze encode`: pooled per document, as npz and Parquet, of texts; each equal to the codes on disk."""

import json
from pathlib import Path

import command_kit
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from command_kit import invoke
from sae_kit import saved

from sae_granary.analyze.cli import app
from sae_granary.analyze.encoding import blocks as blocks_module
from sae_granary.analyze.encoding import export
from sae_granary.analyze.encoding.blocks import stored_blocks
from sae_granary.analyze.encoding.codes import open_codes
from sae_granary.analyze.encoding.document_columns import arrow_column, table_names
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.encoding.outputs import Output, write_cache_codes
from sae_granary.analyze.encoding.pool import pool_documents
from sae_granary.analyze.settings import POOLINGS
from sae_granary.analyze.source import Source, open_source
from sae_granary.cache.opening import open_cache
from sae_granary.common.lock import LockedError
from sae_granary.common.rows import FLAG_SPECIAL

D_SAE = 32


@pytest.fixture
def source(make_cache, tmp_path: Path) -> Source:
    """A cache of three shards and a topk SAE with random weights."""
    folder = saved(tmp_path / "sae", d_sae=D_SAE)
    return open_source(folder, make_cache(n_docs=20, rows_per_shard=300), device="cpu")


def run(*arguments: object, stdin: str | None = None) -> str:
    return invoke(app, *arguments, "--device", "cpu", stdin=stdin).output


def refused(*arguments: object, stdin: str | None = None) -> str:
    return command_kit.refused(app, *arguments, "--device", "cpu", stdin=stdin)


def pooled(dense: np.ndarray, doc_ids: np.ndarray, plain: np.ndarray, how: str) -> np.ndarray:
    reduce = {"max": np.max, "mean": np.mean, "sum": np.sum}[how]
    return np.stack([reduce(dense[(doc_ids == i) & plain].astype(np.float64), axis=0) for i in np.unique(doc_ids)])


@pytest.mark.parametrize("how", POOLINGS)
def test_documents_are_pooled_over_blocks_and_shards(source: Source, monkeypatch, how: str) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_ROWS", 50)
    cache = source.cache
    assert len(cache.shards) > 1
    out = run("encode", source.folder, "--cache", cache.path, "--pool", how)
    folder = source.place / f"documents_{how}"
    assert out == f"{folder}: 20 documents, 32 latents\n"
    found, rows = open_codes(folder), open_codes(source.place / "codes")
    doc_ids, flags = cache.column("doc_id")[:], cache.column("flags")[:]
    assert found.doc_ids is not None
    assert found.doc_ids.tolist() == np.unique(doc_ids).tolist() == np.load(folder / "doc_ids.npy").tolist()
    np.testing.assert_allclose(found.dense(), pooled(rows.dense(), doc_ids, flags & FLAG_SPECIAL == 0, how), rtol=1e-6)
    before = (folder / "record.json").read_bytes()
    assert run("encode", source.folder, "--cache", cache.path, "--pool", how) == out  # what is there is taken
    assert (folder / "record.json").read_bytes() == before


def test_documents_whose_rows_are_not_together_are_pooled(source: Source, monkeypatch) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_ROWS", 64)
    codes = encode_cache(source, source.place / "codes")
    doc_ids = np.random.default_rng(0).integers(0, 9, len(codes))
    flags = source.cache.column("flags")[:]
    blocks = list(pool_documents(stored_blocks(codes, doc_ids, flags, by_document=True), D_SAE, "mean"))
    assert np.concatenate([block.doc_ids for block in blocks]).tolist() == list(range(9))
    found = np.zeros((9, D_SAE))
    counts = np.concatenate([block.counts for block in blocks])
    found[np.repeat(np.arange(9), counts), np.concatenate([block.indices for block in blocks])] = np.concatenate(
        [block.values for block in blocks]
    )
    np.testing.assert_allclose(found, pooled(codes.dense(), doc_ids, flags & FLAG_SPECIAL == 0, "mean"), rtol=1e-6)


def test_blocks_hold_few_rows_where_these_hold_many_entries(source: Source, monkeypatch) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_ENTRIES", 10)
    codes = encode_cache(source, source.place / "codes")
    doc_ids, flags = source.cache.column("doc_id"), source.cache.column("flags")
    blocks = list(stored_blocks(codes, doc_ids, flags))
    assert {len(block.counts) for block in blocks} == {2}
    np.testing.assert_array_equal(np.concatenate([block.values for block in blocks]), codes.values)
    monkeypatch.setattr(blocks_module, "BLOCK_ENTRIES", 1)  # a row is never divided
    assert len(list(stored_blocks(codes, doc_ids, flags))) == len(codes)


@pytest.mark.parametrize("how", [None, "max"])
def test_npz_is_read_by_scipy(source: Source, tmp_path: Path, how: str | None) -> None:
    out = tmp_path / "new" / "codes.npz"
    pool = ["--pool", how] if how else []
    run("encode", source.folder, "--cache", source.cache.path, "--format", "npz", "--out", out, *pool)
    matrix = scipy.sparse.load_npz(out)
    assert isinstance(matrix, scipy.sparse.csr_matrix)
    assert sorted(path.name for path in out.parent.iterdir()) == ["codes.npz"]
    if how:
        run("encode", source.folder, "--cache", source.cache.path, *pool)
    expected = open_codes(source.place / ("documents_max" if how else "codes"))
    np.testing.assert_array_equal(matrix.toarray(), expected.dense())
    doc_ids = source.cache.column("doc_id")[:] if how is None else expected.doc_ids
    np.testing.assert_array_equal(np.load(out)["doc_ids"], doc_ids)


@pytest.mark.parametrize("how", [None, "sum"])
def test_parquet_has_a_row_per_row_or_document_and_its_source(source: Source, monkeypatch, how: str | None) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK_ROWS", 60)
    monkeypatch.setattr(export, "GROUP_ROWS", 100 if how is None else 3)
    pool = ["--pool", how] if how else []
    printed = run("encode", source.folder, "--cache", source.cache.path, "--format", "parquet", *pool)
    out = source.place / ("documents_sum.parquet" if how else "codes.parquet")
    assert str(out) in printed
    table = pq.read_table(out)
    assert pq.ParquetFile(out).num_row_groups > 3
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds["latents"] == "list<element: int32>"
    assert kinds["activations"] == "list<element: float>"
    run("encode", source.folder, "--cache", source.cache.path, *pool)
    expected = open_codes(source.place / ("documents_sum" if how else "codes"))
    assert len(table) == len(expected)
    for i, row in enumerate(table.to_pylist()):
        latents, values = expected.row(i)
        assert row["latents"] == latents.tolist()
        assert row["activations"] == values.tolist()
        document = source.cache.find_document(row["doc_id"])
        assert document is not None
        assert row["source"] == document.source
        if how is None:
            assert (row["row"], row["special"]) == (i, bool(source.cache.column("flags")[i] & FLAG_SPECIAL))
    assert ("row" in kinds) == (how is None)
    assert table["doc_id"].to_pylist() == (
        expected.doc_ids.tolist() if expected.doc_ids is not None else source.cache.column("doc_id")[:].tolist()
    )
    assert "exists: give another --out" in refused(
        "encode", source.folder, "--cache", source.cache.path, "--format", "parquet", *pool
    )


def test_parquet_holds_the_kept_columns_with_their_types(source: Source, make_cache, tmp_path: Path) -> None:
    columns = {
        "category": ("billing", "<b>login</b>", None),
        "size": (1, 2**40),
        "source": (True, None),
        "mixed": ("a", 1),
    }
    cache = make_cache("kept", n_docs=7, columns=columns)
    for pool, name in (([], "rows"), (["--pool", "max"], "documents")):
        out = tmp_path / f"{name}.parquet"
        run("encode", source.folder, "--cache", cache, "--format", "parquet", "--out", out, *pool)
        table = pq.read_table(out)
        kinds = {field.name: str(field.type) for field in table.schema}
        assert [kinds[name] for name in ("category", "size", "kept.source", "mixed")] == [
            "string",
            "int64",
            "bool",
            "string",
        ]
        for row in table.to_pylist():
            i = row["doc_id"]
            assert [row["category"], row["size"]] == [columns["category"][i % 3], columns["size"][i % 2]]
            assert [row["kept.source"], row["mixed"], row["source"]] == [columns["source"][i % 2], "a1"[i % 2], "toy"]
    assert arrow_column([1, 2.5, None]).to_pylist() == [1.0, 2.5, None]
    assert arrow_column([2**70, 3]).to_pylist() == [str(2**70), "3"]  # an id stays exact
    assert arrow_column([0.5, 10**309, None]).to_pylist() == ["0.5", str(10**309), None]  # no double is as large
    assert arrow_column([float("inf"), 1]).to_pylist() == [float("inf"), 1.0]


def test_a_kept_column_never_takes_the_name_of_another(source: Source, make_cache, tmp_path: Path) -> None:
    assert table_names(["row", "kept.row", "size"]) == {"row": "kept.kept.row", "kept.row": "kept.row", "size": "size"}
    cache = make_cache("kept", n_docs=4, columns={"row": (1, 2), "kept.row": ("a", "b")})
    out = tmp_path / "documents.parquet"
    run("encode", source.folder, "--cache", cache, "--format", "parquet", "--out", out, "--pool", "max")
    table = pq.read_table(out)
    assert table["kept.row"].to_pylist() == ["a", "b", "a", "b"]
    assert table["kept.kept.row"].to_pylist() == [1, 2, 1, 2]


def test_an_output_that_another_process_writes_is_refused_and_left_alone(source: Source, tmp_path: Path) -> None:
    codes, out = encode_cache(source), Output(tmp_path / "new" / "pooled", pool="max")
    n_refused = 0

    def meanwhile(n_rows: int) -> None:
        nonlocal n_refused
        with pytest.raises(LockedError, match=r"new is in use by process \d+"):
            write_cache_codes(source, codes, out)
        n_refused += 1

    n_documents = write_cache_codes(source, codes, out, meanwhile)
    assert n_refused > 0
    assert write_cache_codes(source, codes, out) == n_documents == 20
    assert [path.name for path in out.path.parent.iterdir()] == ["pooled"]


def test_bad_flags_are_refused_in_one_line_and_nothing_is_written(source: Source, tmp_path: Path) -> None:
    given = ["encode", source.folder, "--cache", source.cache.path]
    (tmp_path / "list.csv").write_text("id,ticket\n1,a\n")
    before = sorted(tmp_path.rglob("*"))
    for flags, words in (
        (["--format", "csv"], "format='csv': expected one of granary, npz, parquet"),
        (["--pool", "median"], "pool='median': expected one of max, mean, sum"),
        (["--text", "a", "--texts", "-"], "give either --text or --texts"),
        (["--text", "a", "--text-column", "a", "--out", tmp_path / "o"], "--text-column is for --texts"),
        (["--model", "demo"], "--model is for texts"),
        (["--text", "a"], "codes of texts need a place: give --out"),
        (["--texts", tmp_path / "none.txt", "--out", tmp_path / "o"], "no such file"),
        (["--texts", source.cache.path / "manifest.json", "--out", tmp_path / "o"], ".json is not read here"),
        (["--texts", tmp_path / "list.csv", "--out", tmp_path / "o"], "name that of the text with --text-column"),
        (["--texts", tmp_path / "list.csv", "--text-column", "text", "--out", tmp_path / "o"], "columns id, ticket"),
        (["--texts", "-", "--text-column", "a", "--out", tmp_path / "o"], "stdin, line 1: 'b', expected a JSON object"),
        (["--text", "a", "--out", tmp_path / "list.csv"], "exists: give another --out"),
        (["--format", "npz", "--out", tmp_path / "list.csv"], "exists: give another --out"),
    ):
        assert words in refused(*given, *flags, stdin="b\n"), flags
    assert sorted(tmp_path.rglob("*")) == before


def test_json_record_of_codes_names_its_pooling(source: Source) -> None:
    run("encode", source.folder, "--cache", source.cache.path, "--pool", "max")
    record = json.loads((source.place / "documents_max" / "record.json").read_text())
    assert (record["identity"]["pool"], record["complete"]) == ("max", True)
    assert "belongs to another pool: None, expected max" in refused(
        "encode", source.folder, "--cache", open_cache(source.cache.path).path, "--pool", "max",
        "--out", source.place / "codes",
    )  # fmt: skip
