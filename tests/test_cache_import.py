"""sae-cache import and CacheWriter: vectors from files of any format, and every way in which they can be wrong."""

import json
import os
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_kit import run_cache
from command_kit import run_python
from safetensors.numpy import save_file

from sae_granary import CacheWriter, open_cache
from sae_granary.cache.errors import BadRowsError, CacheExistsError
from sae_granary.cache.read.verify import verify

run = partial(run_cache, "import")
N, D = 50, 8
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, D)).astype(np.float32)
IDS = [f"doc-{i}" for i in range(N)]
TEXTS = [f"text number {i}" for i in range(N)]


def table(x=X, ids=IDS, texts=TEXTS, **more):
    return pa.table({"id": ids, "text": texts, "embedding": [list(map(float, row)) for row in x], **more})


def write(path, kind, x=X):
    if kind == "npy":
        np.save(path, x)
    elif kind == "npz":
        np.savez_compressed(path, embedding=x, id=np.array(IDS), text=np.array(TEXTS))
    elif kind == "parquet":
        pq.write_table(table(x), path, row_group_size=20)
    elif kind == "safetensors":
        save_file({"embedding": x, "id": np.arange(N)}, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table(x).schema) as stream:
            stream.write_table(table(x), max_chunksize=15)
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "parquet", "safetensors", "arrow"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    path, out = write(tmp_path / f"x.{kind}", kind), tmp_path / "cache"
    flags = [] if kind == "npy" else ["--id-column", "id"]
    flags += ["--text-column", "text"] if kind in ("npz", "parquet", "arrow") else []
    run(path, "--out", out, "--rows-per-shard", 16, *flags)
    cache = open_cache(out)
    np.testing.assert_array_equal(cache.hook()[:], X)
    assert verify(out).ok
    assert (cache.unit, len(cache.shards)) == ("text", 4)
    document = cache.document(33)
    assert (document.source, document.source_row) == (path.name, 33)
    if "--text-column" in flags:
        assert document.text == TEXTS[33]
    if flags:
        assert document.columns == {"id": IDS[33] if kind != "safetensors" else 33}


def test_several_files_follow_each_other_and_columns_are_kept(tmp_path):
    for i, part in enumerate((slice(0, 20), slice(20, N))):
        more = {"label": [f"l{j % 3}" for j in range(N)][part], "score": [float("nan")] * len(X[part])}
        pq.write_table(table(X[part], IDS[part], TEXTS[part], **more), tmp_path / f"{i}.parquet")
    files = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    flags = "--id-column id --keep-columns label,score --hook ada --dtype float16"
    run(*files, "-o", tmp_path / "c", *flags.split())
    cache = open_cache(tmp_path / "c")
    np.testing.assert_array_equal(cache.hook("ada")[:], X.astype(np.float16))
    assert cache.document_column("label")[21] == "l0"
    assert cache.document_column("score")[0] is None
    assert cache.document(20).source_row == 0


def test_a_plan_writes_nothing(tmp_path):
    path = write(tmp_path / "x.parquet", "parquet")
    body = json.loads(run(path, "--out", tmp_path / "c", "--plan", "--json").stdout)
    assert (body["n_rows"], body["d_in"], body["columns"]["vectors"]) == (N, D, "embedding")
    assert f"{N} rows of {D} numbers" in run(path, "--out", tmp_path / "c", "--plan").stdout
    assert not (tmp_path / "c").exists()
    assert body["free_bytes"] > body["n_bytes"]


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_bytes_of_an_import_are_planned_within_2_percent(tmp_path, kind, dtype):
    n, path, out, flags = 6000, tmp_path / f"x.{kind}", tmp_path / "c", ["--dtype", dtype, "--rows-per-shard", "4k"]
    x = RNG.normal(size=(n, 64)).astype(np.float32)
    if kind == "npy":
        np.save(path, x)
    else:  # a third of the cache is text
        texts = [" ".join(map(str, RNG.integers(0, 10**6, 40))) for _ in range(n)]
        pq.write_table(table(x, [f"doc-{i}" for i in range(n)], texts, label=["a", None] * (n // 2)), path)
        flags += ["--id-column", "id", "--text-column", "text", "--keep-columns", "label"]
    told = json.loads(run(path, "--out", out, "--plan", "--json", *flags).stdout)["n_bytes"]
    run(path, "--out", out, *flags)
    real = sum(f.stat().st_size for f in out.rglob("*") if f.is_file() and f.name != "about.json")
    assert told == pytest.approx(real, rel=0.02)


def test_an_import_that_does_not_fit_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    path = write(tmp_path / "x.npy", "npy")
    monkeypatch.setattr("sae_granary.common.files.free_bytes", lambda path: 1000)
    assert "it does NOT fit, 1000 B are free" in run(path, "--out", tmp_path / "c", "--plan", code=1).stdout
    assert "no space for" in run(path, "--out", tmp_path / "c", code=2).stderr
    assert not (tmp_path / "c").exists()


def _nan(x):
    x[33, 2] = np.nan
    return x


def _overwrite(path, at, data):
    with open(path, "rb+") as file:
        file.seek(at)
        file.write(data)


BAD = {
    "nan": (lambda p: np.save(p, _nan(X.copy())), [], "x.npy: row 33: value nan in column 2"),
    "overflow": (lambda p: np.save(p, np.where(X[40, 1] == X, 1e6, X)), ["--dtype", "float16"], "x.npy: row 40: "),
    "objects": (lambda p: np.save(p, np.array([[1], [1, 2]], object), allow_pickle=True), [], "array of objects"),
    "one dimension": (lambda p: np.save(p, X[0]), [], "expected numbers of shape (N, D)"),
    "text": (lambda p: np.save(p, np.array([["a"]])), [], "expected numbers of shape (N, D)"),
    "empty": (lambda p: np.save(p, X[:0]), [], "it has no rows"),
    "no npy": (lambda p: p.write_bytes(b"hello"), [], "x.npy: "),
    "header": (lambda p: (np.save(p, X), _overwrite(p, 10, b"{" * 8)), [], "x.npy: not readable"),
    "truncated": (lambda p: (np.save(p, X), os.truncate(p, 300)), [], "x.npy: not readable"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_one_line_and_nothing_is_written(tmp_path, name):
    make, flags, expected = BAD[name]
    make(tmp_path / "x.npy")
    error = run(tmp_path / "x.npy", "--out", tmp_path / "c", "--rows-per-shard", 8, *flags, code=2).stderr
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def _ragged():
    rows = [list(map(float, row)) for row in X]
    rows[41] = rows[41][:3]
    return rows


BAD_TABLES = {
    "ragged": ({"embedding": _ragged()}, [], "row 41: embedding has 3 numbers, expected 8"),
    "null": ({"embedding": [list(map(float, r)) for r in X[:-1]] + [None]}, [], "row 49: embedding is null"),
    "null number": ({"embedding": [[1.0] * 7 + [None]] * N}, [], "row 0: value nan in column 7"),
    "repeated id": ({"id": [*IDS[:-1], "doc-3"]}, ["--id-column", "id"], "row 49: id 'doc-3' is there twice"),
    "missing id": ({"id": [*IDS[:-1], None]}, ["--id-column", "id"], "row 49: an id is missing"),
    "text is no text": ({"text": list(range(N))}, ["--text-column", "text"], "row 0: the text is 0"),
    "no such column": ({}, ["--text-column", "texts"], "--text-column texts: no such column, did you mean 'text'?"),
    "no vectors": ({"embedding": IDS}, [], "holds no vectors"),
    "two": ({"other": [[1.0]] * N}, [], "several vectors (embedding, other)"),
    "list": ({"tags": [["a"]] * N}, ["--keep-columns", "tags"], "x.parquet: row 0: tags is ['a'], expected a text,"),
    "dict": ({"id": [{"a": i} for i in range(N)]}, ["--id-column", "id"], "x.parquet: row 0: id is {'a': 0}, expected"),
    "rows per shard": ({}, ["--rows-per-shard", 0], "rows_per_shard is 0, expected 1"),
    "dtype": ({}, ["--dtype", "float8"], "dtype is 'float8', expected one of float32,"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_one_line_and_nothing_is_written(tmp_path, name):
    columns, flags, expected = BAD_TABLES[name]
    good = table()
    pq.write_table(pa.table({**{n: good[n] for n in good.column_names}, **columns}), tmp_path / "x.parquet")
    error = run(tmp_path / "x.parquet", "--out", tmp_path / "c", "--rows-per-shard", 8, *flags, code=2).stderr
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_in_the_middle_of_an_archive_is_one_line(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, x=np.random.default_rng(0).standard_normal((200_000, 8)).astype(np.float32))
    _overwrite(path, path.stat().st_size - 1000, bytes(500))
    error = run(path, "--out", tmp_path / "c", "--rows-per-shard", 8192, code=2).stderr
    assert f"{path}: x.npy: not readable: " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_files_of_different_widths_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", X)
    np.save(tmp_path / "b.npy", X[:, :5])
    error = run(tmp_path / "a.npy", tmp_path / "b.npy", "--out", tmp_path / "c", code=2).stderr
    assert "b.npy: vectors of 5 numbers, those of" in error
    assert not (tmp_path / "c").exists()


def test_what_is_no_file_of_vectors(tmp_path):
    (tmp_path / "x.txt").write_text("hello")
    assert "expected --format npy" in run(tmp_path / "x.txt", "--out", tmp_path / "c", code=2).stderr
    assert "does not exist" in run(tmp_path / "x.npy", "--out", tmp_path / "c", code=2).stderr
    os.mkfifo(tmp_path / "f.npy")
    assert "FIFO" in run(tmp_path / "f.npy", "--out", tmp_path / "c", code=2).stderr
    for kind in ("npy", "npz", "parquet", "safetensors", "arrow"):
        assert run(tmp_path / "x.txt", "--out", tmp_path / "c", "--format", kind, code=2).stderr.count("\n") == 1


KILLED = """
import os, sys
from pathlib import Path
from sae_granary.cache.vectors import importer
plan = importer.plan_import([Path(sys.argv[1])], Path(sys.argv[2]), id_column="id", rows_per_shard=16)
def stop(done):
    if done >= 40:
        os._exit(9)
importer.import_vectors(plan, stop)
"""


def test_a_killed_import_continues_to_the_same_bytes(tmp_path, monkeypatch):
    from sae_granary.cache.vectors import tables

    path = write(tmp_path / "x.parquet", "parquet")
    code = KILLED.replace(
        "plan =", "from sae_granary.cache.vectors import tables\ntables.batch_rows = lambda n: 10\nplan ="
    )
    run_python(code, path, tmp_path / "a", code=9)
    assert not open_cache(tmp_path / "a", allow_incomplete=True).complete
    flags = ["--id-column", "id", "--rows-per-shard", 16]
    other = write(tmp_path / "other/x.parquet" if (tmp_path / "other").mkdir() is None else path, "parquet", X + 1)
    assert "harvested from something else" in run(other, "--out", tmp_path / "a", *flags, code=2).stderr
    run(path, "--out", tmp_path / "a", *flags)
    monkeypatch.setattr(tables, "batch_rows", lambda n: 7)
    run(path, "--out", tmp_path / "b", *flags)
    a, b = ({f.relative_to(p) for f in p.rglob("*") if f.is_file()} for p in (tmp_path / "a", tmp_path / "b"))
    files = b - {Path("about.json")}  # holds the time
    assert files == a - {Path("about.json")}
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert "complete already" in run(path, "--out", tmp_path / "a", *flags).stdout


def test_a_complete_cache_is_not_taken_for_that_of_other_flags(tmp_path):
    path, out = write(tmp_path / "x.parquet", "parquet"), tmp_path / "c"
    run(path, "--out", out)
    assert "complete already" in run(path, "--out", out).stdout
    for flags in (["--id-column", "id"], ["--text-column", "text"], ["--hook", "clip"], ["--dtype", "float16"]):
        error = run(path, "--out", out, *flags, code=2).stderr
        assert "this command wants" in error
        assert f"--out {out}_2" in error.replace("\n", " ")
    run(path, "--out", tmp_path / "text", "--text-column", "text")
    assert "kept_columns" in run(path, "--out", tmp_path / "text", "--keep-columns", "text", code=2).stderr


def test_texts_cannot_be_encoded_by_a_cache_without_a_model(tmp_path, monkeypatch):
    from sae_granary.models.errors import ModelError
    from sae_granary.models.language import recorded

    run(write(tmp_path / "x.npy", "npy"), "--out", tmp_path / "c")
    monkeypatch.setattr(recorded, "read_configs", lambda located: pytest.fail(f"looked for {located.source}"))
    with pytest.raises(ModelError, match=r"names no model .*with --model"):
        recorded.locate_recorded(open_cache(tmp_path / "c").manifest.model, None, "--model")


def test_the_writer_takes_arrays_lists_and_tensors(tmp_path):
    import torch

    with CacheWriter(tmp_path / "c", hook="clip", d_in=D, rows_per_shard=16) as writer:
        writer.add(X[:20], texts=TEXTS[:20], ids=IDS[:20], columns={"n": range(20)})
        writer.add(X[20:30].tolist(), texts=TEXTS[20:30], ids=IDS[20:30], columns={"n": range(10)})
        writer.add(torch.tensor(X[30:]), texts=TEXTS[30:], ids=IDS[30:], columns={"n": range(20)})
    cache = open_cache(tmp_path / "c")
    np.testing.assert_array_equal(cache.hook("clip")[:], X)
    assert verify(tmp_path / "c").ok
    with CacheWriter(tmp_path / "half", d_in=D) as writer:
        writer.add(torch.tensor(X).bfloat16())
    assert open_cache(tmp_path / "half").dtype == "float32"
    np.testing.assert_array_equal(
        open_cache(tmp_path / "half").hook()[:], X.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert open_cache(tmp_path / "half").manifest.fingerprint != cache.manifest.fingerprint


def test_the_writer_refuses_and_continues(tmp_path):
    with pytest.raises(BadRowsError, match="ragged"), CacheWriter(tmp_path / "c", d_in=2) as writer:
        writer.add([[1, 2], [3]])
    with pytest.raises(BadRowsError, match=r"\(N, 8\)"), CacheWriter(tmp_path / "c", d_in=8) as writer:
        writer.add(X[:, :3])
    with pytest.raises(BadRowsError, match="no rows were added"), CacheWriter(tmp_path / "c", d_in=8):
        pass
    assert not (tmp_path / "c").exists()
    writer = CacheWriter(tmp_path / "c", d_in=8, rows_per_shard=16)
    writer.add(X[:40])
    writer.close()
    with pytest.raises(CacheExistsError, match="resume=True"):
        CacheWriter(tmp_path / "c", d_in=8, rows_per_shard=16)
    with CacheWriter(tmp_path / "c", d_in=8, rows_per_shard=16, resume=True) as writer:
        assert writer.n_rows == 32
        writer.add(X[writer.n_rows :])
    np.testing.assert_array_equal(open_cache(tmp_path / "c").hook()[:], X)
    with pytest.raises(CacheExistsError, match="complete"):
        CacheWriter(tmp_path / "c", d_in=8, resume=True)
