"""`--keep-columns`: columns of the source's records are stored with the documents, and old caches stay as they are."""

import io
import json
import re
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_kit import contents
from command_kit import refused
from harvest_kit import CutOff, build_model, cut_off_after, texts

from sae_granary import harvest_activations, open_cache
from sae_granary.cache.errors import BadRowsError, CacheMismatchError, CorruptCacheError, UnknownNameError
from sae_granary.cache.format.documents import KEPT, SCHEMA, DocumentFile, read_kept_column
from sae_granary.cache.read.verify import verify
from sae_granary.common.errors import ConfigError
from sae_granary.common.rows import DocumentRow
from sae_granary.harvest.cli import app
from sae_granary.harvest.config import TextConfig
from sae_granary.harvest.errors import HarvestError, SourceError
from sae_granary.harvest.text.kept import scalar
from sae_granary.harvest.text.local_files import FileSource
from sae_granary.harvest.text.stdin_source import StdinSource

CUT = 25  # batches: the first sort buffer is committed by then
CATEGORIES = ("billing", "login", "déjà <b>vu</b>")
ANY_TEXT = '\x1b[31m"quoted", and\nlines \u202e'


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    """90 tickets, every tenth without a text."""
    lines = ["ticket_id,text,category"]
    for i, text in enumerate(texts(90)):
        lines.append(f"T{i},{'' if i % 10 == 9 else text},{CATEGORIES[i % 3]}")
    path = tmp_path / "tickets.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def flags(tmp_path: Path, tickets: Path) -> dict[str, Any]:
    model = build_model(tmp_path / "model", "bert")
    return {
        "model": str(model), "layers": 1, "dataset": str(tickets), "device": "cpu", "ctx_len": 16, "quiet": True,
        "rows_per_shard": 512, "batch_tokens": 128,
    }  # fmt: skip


def kept(path: Path, text: str, *names: str) -> list[dict[str, Any]]:
    path.write_text(text, encoding="utf-8")
    return [dict(record.columns) for record in FileSource(TextConfig(str(path), keep_columns=names)).records(0)]


def test_columns_are_stored_with_the_documents_and_a_resume_is_byte_equal(flags: Any, tmp_path: Path) -> None:
    def harvest(name: str) -> dict[str, bytes]:
        harvest_activations(**flags, keep_columns="ticket_id,category", out=tmp_path / name)
        return contents(tmp_path / name)

    with cut_off_after(CUT), pytest.raises(CutOff):
        harvest("cut")
    assert list((tmp_path / "cut" / "commits").iterdir())
    for other in ("ticket_id", None):
        with pytest.raises(CacheMismatchError, match="kept_columns: the cache has 'ticket_id,category', this command"):
            harvest_activations(**flags, keep_columns=other, out=tmp_path / "cut")
    assert harvest("cut") == harvest("whole")
    cache = open_cache(tmp_path / "whole")
    assert len(cache.shards) > 1
    ids = cache.document_ids()
    assert ids == [i for i in range(90) if i % 10 != 9]
    assert cache.document_column("ticket_id") == [f"T{i}" for i in ids]
    assert cache.document_column("category") == [CATEGORIES[i % 3] for i in ids]
    for row in range(0, cache.n_rows, 97):
        document = cache.document(row)
        columns = {"ticket_id": f"T{document.doc_id}", "category": CATEGORIES[document.doc_id % 3]}
        assert document.columns == columns
    assert cache.facts()["kept columns"] == "ticket_id, category"
    assert verify(tmp_path / "whole").ok
    with pytest.raises(UnknownNameError, match=r"no column 'categroy'.*did you mean 'category'.*keeps ticket_id, cat"):
        cache.document_column("categroy")


def test_without_columns_nothing_is_other_than_before(flags: Any, tmp_path: Path) -> None:
    harvest_activations(**flags, out=tmp_path / "plain", max_docs=5)
    harvest_activations(**flags, out=tmp_path / "kept", max_docs=5, keep_columns=["category"])
    manifest = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    assert "kept_columns" not in {**manifest, **manifest["fingerprint"]}
    file = "documents/00000000.parquet"
    assert pq.read_schema(tmp_path / "plain" / file).equals(SCHEMA)
    names = SCHEMA.names  # what a reader that does not know kept columns asks for
    plain, other = (pq.ParquetFile(tmp_path / name / file).read(columns=names) for name in ("plain", "kept"))
    assert plain.equals(other)
    cache = open_cache(tmp_path / "plain")
    assert (cache.kept_columns, cache.document(0).columns) == ((), {})
    with pytest.raises(UnknownNameError, match=r"keeps none; harvest again with --keep-columns"):
        cache.document_column("category")


def test_values_keep_their_types(tmp_path: Path) -> None:
    values = ["a", "", 7, 2**70, 2.5, True, None, [1, "b"], {"c": None}, ANY_TEXT, "12:30"]
    lines = [json.dumps({"text": "some text", "x": value, "in": {"x": 1}}) for value in values]
    found = kept(tmp_path / "a.jsonl", "\n".join([*lines, '{"text": "no x"}', "no JSON"]), "x", "in.x")
    assert [each.get("x") for each in found] == [*values[:7], '[1, "b"]', '{"c": null}', *values[9:], None, None]
    assert [each.get("in.x") for each in found] == [1] * len(values) + [None, None]
    assert [scalar(value) for value in (float("nan"), float("inf"), b"\xff", "\ud800")] == [None, None, "�", "�"]
    stored = [scalar(value) for value in values]
    file = DocumentFile(tmp_path / "documents", ["text", "x.y", "x"])  # names like those of the format, and dotted
    for i, value in enumerate(stored):
        file.append([DocumentRow(i, "source", i, "text", {"x.y": value, "x": i, "text": "other"})])
    file.finish()
    again = read_kept_column(tmp_path / "documents", "x.y")
    assert [(type(value), value) for value in again] == [(type(value), value) for value in stored]
    assert read_kept_column(tmp_path / "documents", "x") == list(range(len(stored)))
    assert read_kept_column(tmp_path / "documents", "text") == ["other"] * len(stored)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_times_are_kept_as_text(tmp_path: Path, suffix: str) -> None:
    moments = [datetime(2024, 5, 1, 12, 30, tzinfo=UTC), None]
    table = pa.table(
        {
            "text": ["one", "two"],
            "at": pa.array(moments, pa.timestamp("us", "UTC")),
            "far": pa.array([2**62, None], pa.timestamp("us")),
            "on": pa.array([date(2024, 5, 1), None]),
            "price": pa.array([Decimal("1.50"), None]),
            "tags": [["a"], []],
        }
    )
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    source = FileSource(TextConfig(str(path), keep_columns=("at", "far", "on", "price", "tags")))
    first, second = (record.columns for record in source.records(0))
    assert first["at"] == "2024-05-01 12:30:00.000000Z"
    assert isinstance(first["far"], str)
    assert [first[name] for name in ("on", "price", "tags")] == ["2024-05-01", "1.50", '["a"]']
    assert list(second.values()) == [None, None, None, None, "[]"]


@pytest.mark.parametrize("columns", [{}, {"x": 1, "y": 2}, {"x": [1]}, {"x": float("nan")}])
def test_the_writer_takes_no_other_columns(tmp_path: Path, columns: dict[str, Any]) -> None:
    file = DocumentFile(tmp_path / "documents", ["x"])
    with pytest.raises(BadRowsError, match=r"document 3 (has columns|keeps)"):
        file.append([DocumentRow(3, "source", 3, "text", columns)])
    file.close()


def test_a_damaged_kept_column_is_found(tmp_path: Path) -> None:
    for name, cell in {"list": "[1]", "text": "half a te"}.items():
        pq.write_table(pa.table({KEPT + "x": [cell]}), tmp_path / name)
        with pytest.raises(CorruptCacheError, match="expected a JSON scalar"):
            read_kept_column(tmp_path / name, "x")


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", "id,text,category\n1,one,x\n", "categry", r"no column 'categry' for --keep-columns, did you mean "
         r"'category'\?; its columns are id, text, category"),
        ("a.csv", '"i\nd",text\n1,one\n', "x", r"its columns are i\\nd, text"),  # one line
        ("a.csv", "id,text,id\n1,one,2\n", "id", "two columns 'id'"),
        ("a.txt", "some text", "id", r"--keep-columns id does not apply to .*\(plain text, which has no columns"),
        ("a.csv", "id,text\n1,one\n", "id,id", "--keep-columns id,id names a column twice"),
        ("a.csv", "id,text\n1,one\n", " , ", "keep_columns=. , . is empty: give a value"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_before_the_model(
    tmp_path: Path, name: str, text: str, columns: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    out = tmp_path / "out"
    model = build_model(tmp_path / "model", "bert")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")  # loading it would be another error
    args = ["run", "--model", model, "--layer", 1, "--dataset", tmp_path / name, "--out", out, "--device", "cpu"]
    assert re.search(message, refused(app, *args, "--keep-columns", columns))
    assert not out.exists()


def test_the_demo_text_has_no_columns(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--keep-columns id does not apply to --dataset demo \(.*no columns"):
        harvest_activations(model="demo", layers=3, dataset="demo", keep_columns="id", out=tmp_path / "a", quiet=True)


def test_every_table_of_a_folder_must_have_the_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,one\n")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    with pytest.raises(SourceError, match=r"b\.jsonl has no column 'id' for --keep-columns"):
        FileSource(TextConfig(str(tmp_path), keep_columns=("id",)))


def test_columns_of_standard_input() -> None:
    lines = [{"text": "one", "id": 1}, {"text": "two"}]
    stream = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
    source = StdinSource(TextConfig("-", keep_columns=("id",)), stream)
    assert [record.columns for record in source.records(0)] == [{"id": 1}, {"id": None}]
    assert source.identity["kept_columns"] == "id"
    for text, message in ((b"plain text\n", "does not apply to standard input"), (b'{"text": "a"}', "no column 'id'")):
        with pytest.raises(SourceError, match=message):
            StdinSource(TextConfig("-", keep_columns=("id",)), io.BytesIO(text))


def test_a_resume_compares_the_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input cannot be hashed beforehand: what is committed is compared."""
    flags = {
        "model": str(build_model(tmp_path / "model", "bert")), "layers": 1, "dataset": "-", "device": "cpu",
        "ctx_len": 16, "rows_per_shard": 512, "batch_tokens": 128, "keep_columns": "id", "quiet": True,
        "out": tmp_path / "out",
    }  # fmt: skip

    def pipe(change: int) -> None:
        lines = [json.dumps({"text": text, "id": i + change * (i == 3)}) for i, text in enumerate(texts(90))]
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))

    pipe(0)
    with cut_off_after(CUT), pytest.raises(CutOff):
        harvest_activations(**flags)
    pipe(10)
    with pytest.raises(HarvestError, match=r"record 3: .*column 'id' is 13, it was 3"):
        harvest_activations(**flags)
