"""Sources: formats, columns, what is skipped or repaired, order, and retries."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sae_granary.harvest.config import TextConfig
from sae_granary.harvest.errors import SourceError, SourceStoppedError
from sae_granary.harvest.text.columns import choose_columns, column_kinds, extractor
from sae_granary.harvest.text.demo_source import DemoSource
from sae_granary.harvest.text.document import Record, Unfit, shuffled, to_document
from sae_granary.harvest.text.hub_source import HubSource, retrying
from sae_granary.harvest.text.local_files import FileSource
from sae_granary.harvest.text.sources import open_source
from sae_granary.harvest.text.stdin_source import StdinSource
from sae_granary.models.tokens.document import join_chat, replace_surrogates


def values(path: Path, **options: object) -> list[object]:
    return [record.value for record in FileSource(TextConfig(str(path), **options)).records(0)]


def test_each_format_gives_its_texts(tmp_path: Path) -> None:
    records = [{"id": 1, "text": "ein"}, {"id": 2, "text": "zwei\nZeilen"}, {"id": 3, "text": None}]
    want = ["ein", "zwei\nZeilen", None]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.json").write_text(json.dumps({"version": 1, "data": records}))
    (tmp_path / "d.json").write_text(lines)
    (tmp_path / "e.csv").write_text('id,text\n1,ein\n2,"zwei\nZeilen"\n')
    (tmp_path / "f.tsv").write_text("id\ttext\n1\tein\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "g.parquet")
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "i.jsonl.zst"), "zstd") as stream:
        stream.write(lines.encode())
    for name in ("a.jsonl", "b.json", "c.json", "d.json", "g.parquet", "h.jsonl.gz", "i.jsonl.zst"):
        assert values(tmp_path / name) == want, name
    assert values(tmp_path / "e.csv") == want[:2]
    assert values(tmp_path / "f.tsv") == want[:1]


def test_plain_text_is_one_document_or_one_per_line_or_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("one\ntwo\n\n\nthree\n")
    assert values(path) == ["one\ntwo\n\n\nthree\n"]
    assert values(path, documents="line") == ["one", "two", "", "", "three"]
    assert values(path, documents="paragraph") == ["one\ntwo\n", "three\n"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.txt.gz", "c.bin", ".hidden.txt", "d.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = b'{"content": "d"}\n' if name == "d.jsonl" else name.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    source = FileSource(TextConfig(str(tmp_path)))
    assert [(r.source, r.row, r.value) for r in source.records(0)] == [
        ("a.txt", 0, "a.txt"), ("b/1.txt.gz", 0, "b/1.txt.gz"), ("b/2.txt", 0, "b/2.txt"), ("d.jsonl", 0, "d"),
    ]  # fmt: skip
    assert [r.value for r in source.records(2)] == ["b/2.txt", "d"]


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"id": 1, "Text": "a"}, ("Text",)),
        ({"title": "t", "content": "c"}, ("content",)),
        ({"text": 3, "sentence": "s"}, ("sentence",)),
        ({"messages": [{"role": "user", "content": "hi"}], "title": "t"}, ("messages",)),
        ({"conversations": [{"from": "human", "value": "hi"}]}, ("conversations",)),
        ({"instruction": "i", "input": "", "output": "o"}, ("instruction", "input", "output")),
        ({"id": 1, "lyrics": "la"}, ("lyrics",)),
    ],
)
def test_the_text_column_is_detected(record: dict[str, object], columns: tuple[str, ...]) -> None:
    assert choose_columns(column_kinds([record]), (), "data") == columns


def test_an_unknown_column_is_refused_with_the_ones_there_are() -> None:
    kinds = column_kinds([{"a": "x", "b": "y", "n": 1}])
    with pytest.raises(SourceError, match=r"data has no column 'text'; its columns are a, b, n: .*--text-column"):
        choose_columns(kinds, ("text",), "data")
    with pytest.raises(SourceError, match=r"no column that looks like its text; its columns are a, b, n"):
        choose_columns(kinds, (), "data")
    assert extractor(("a", "b"))({"a": "x", "b": None}) == "x"
    assert extractor(("a", "b"))({"a": "x", "b": "y"}) == "x\ny"
    assert extractor(("a", "b"))({"a": None}) is None


@pytest.mark.parametrize(
    ("value", "skipped", "text"),
    [
        ("fine\tand\nfine", None, "fine\tand\nfine"),
        (None, "none", ""),
        ("", "empty", ""),
        (" \n\t", "empty", ""),
        ("a\0b", "binary", ""),
        ("\x01\x02\x03abc", "binary", ""),
        (7, "not_text", ""),
        (b"bytes", "not_text", ""),
        ([], "none", ""),
        ("lone \ud800 surrogate", None, "lone \ufffd surrogate"),
        ("pair \ud83d\ude00", None, "pair \U0001f600"),
        ([{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}, 3], None, "user: a\n\nassistant: b"),
        ([{"role": "user", "content": [{"type": "text", "text": "part"}]}], None, "user: part"),
    ],
)
def test_records_become_documents_or_are_marked_as_skipped(value: object, skipped: str | None, text: str) -> None:
    document = to_document(5, Record(value, "f", 5), join_chat)
    assert (document.doc_id, document.skipped, document.text) == (5, skipped, text)


def test_bytes_that_are_no_text_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff")
    (record,) = FileSource(TextConfig(str(tmp_path))).records(0)
    assert (record.value, record.repaired) == ("caf\ufffd \ufffd", True)
    assert replace_surrogates("plain") == "plain"


def test_stdin_takes_lines_or_json_lines() -> None:
    def read(data: bytes, start: int = 0, **options: object) -> list[object]:
        return [r.value for r in StdinSource(TextConfig("-", **options), io.BytesIO(data)).records(start)]

    assert read(b"one\r\n\ntwo") == ["one", "", "two"]
    assert read(b"one\n\ntwo", start=2) == ["two"]
    assert read(b'{"text": "a"}\nbroken\n{"text": "b"}\n') == ["a", Unfit.NOT_JSON, "b"]
    assert read(b"a\nb\n\nc\n", documents="paragraph") == ["a\nb\n", "c\n"]
    assert read(b"") == []
    with pytest.raises(SourceError, match=r"--text-column a does not apply to standard input whose first line is no"):
        read(b"one\ntwo\n", text_columns=("a",))


def test_the_shuffle_is_a_permutation_and_a_function_of_its_seed() -> None:
    records = [Record(i, "s", i) for i in range(100)]
    first = [r.value for r in shuffled(records, 16, seed=1)]
    assert first == [r.value for r in shuffled(records, 16, seed=1)]
    assert sorted(first) == list(range(100))
    assert first != list(range(100))
    assert first != [r.value for r in shuffled(records, 16, seed=2)]
    assert [r.value for r in shuffled(records, 0, seed=1)] == list(range(100))


def test_retries_lose_and_double_nothing() -> None:
    said: list[str] = []
    waited: list[float] = []
    failing = {3, 4, 7}

    def open_at(start: int) -> Iterator[int]:
        for i in range(start, 10):
            if i in failing:
                failing.discard(i)
                raise ConnectionResetError("reset by peer")
            yield i

    assert list(retrying(open_at, 1, (1.0, 2.0), said.append, waited.append)) == list(range(1, 10))
    assert waited == [1.0, 1.0, 1.0]
    assert "record 3" in said[0]


def test_a_source_that_stays_away_stops_with_a_way_to_continue() -> None:
    def open_at(start: int) -> Iterator[int]:
        yield from range(start, 5)
        raise TimeoutError("no answer")

    stream = retrying(open_at, 0, (0.0, 0.0), lambda message: None, lambda seconds: None)
    with pytest.raises(SourceStoppedError, match=r"record 5 after 2 retries \(no answer\); the same command continues"):
        list(stream)


def test_a_data_set_is_streamed_as_the_hub_would(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(20)))
    source = HubSource(TextConfig(str(tmp_path)))
    assert [r.value for r in source.records(17)] == ["t17", "t18", "t19"]
    assert [r.row for r in source.records(18)] == [18, 19]
    mixed = HubSource(TextConfig(str(tmp_path), shuffle_buffer=8, shuffle_seed=3))
    order = [r.value for r in mixed.records(0)]
    assert sorted(order) == sorted(f"t{i}" for i in range(20))
    assert [r.value for r in mixed.records(5)] == order[5:]
    with pytest.raises(SourceError, match=r"Bad split: test.*train"):
        HubSource(TextConfig(str(tmp_path), split="test"))


def test_the_demo_text_is_the_sorted_topics() -> None:
    from pydoc_data.topics import topics

    records = list(DemoSource().records(0))
    assert [r.source.split(":")[1] for r in records] == sorted(topics)
    assert records[3].value == topics[sorted(topics)[3]]
    assert [r.row for r in DemoSource().records(70)] == list(range(70, len(topics)))


def test_tables_of_a_folder_share_their_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("text,n\none,1,\n")
    (tmp_path / "c.jsonl").write_text('{"m": 1, "text": "two"}\nbroken\n')
    assert values(tmp_path) == ["one", "two", Unfit.NOT_JSON]
    (tmp_path / "d.json").write_text('[{"text": "three"},\n{"text": "fo')
    with pytest.raises(SourceError, match=r"d\.json is invalid JSON"):
        values(tmp_path)
    (tmp_path / "d.json").write_text('[{"other": "three"}]')
    with pytest.raises(SourceError, match=r"d\.json has no column 'text', the text of .*b\.csv; its columns are other"):
        values(tmp_path)


def test_a_table_must_hold_text_but_not_in_its_first_records(tmp_path: Path) -> None:
    rows = [{"text": None, "body": "x"}] * 150
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for make in (FileSource, HubSource):
        with pytest.raises(SourceError, match=r"no text in text in its first 150 .*\(150 none\).*are body: name one"):
            make(TextConfig(str(tmp_path)))
        assert next(make(TextConfig(str(tmp_path), text_columns=("body",))).records(0)).value == "x"
    path.write_text(path.read_text() + '{"text": "late", "body": "x"}\n')
    for make in (FileSource, HubSource):
        assert [r.value for r in make(TextConfig(str(tmp_path))).records(150)] == ["late"]


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./missing", "missing.txt", "data/missing.jsonl.gz"])
def test_a_path_that_is_not_there_is_no_hub_name(name: str) -> None:
    with pytest.raises(SourceError, match=r"there is no file or folder .*missing|nowhere"):
        open_source(TextConfig(name), lambda message: None)


def test_the_home_of_nobody_is_no_data_set() -> None:
    with pytest.raises(SourceError, match=r"--dataset ~no-such-user/a\.txt names no folder"):
        open_source(TextConfig("~no-such-user/a.txt"), lambda message: None)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"one line\n" * 1000)
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceStoppedError, match=r"a\.txt\.gz cannot be read: .*; fix or remove it"):
        values(tmp_path / "a.txt.gz")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(SourceError, match=r"b\.parquet is not a Parquet file"):
        values(tmp_path / "b.parquet")
