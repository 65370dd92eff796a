"""Tables as they are: quotes, delimiters, headers and bytes of .csv and .tsv files, and records that do not fit."""

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from command_kit import run_python

from sae_granary.harvest.config import TextConfig
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.document import Record, Unfit, to_document
from sae_granary.harvest.text.local_files import FileSource
from sae_granary.models.tokens.document import join_chat


def records(path: Path, text: str | bytes, **options: object) -> list[Record]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(FileSource(TextConfig(str(path), **options)).records(0))


def values(path: Path, text: str | bytes, **options: object) -> list[object]:
    return [record.value for record in records(path, text, **options)]


def test_quotes_in_a_tsv_are_text(tmp_path: Path) -> None:
    lines = ["id\ttext", '1\t"an open quote', "2\ttwo", "3\tthree", '4\t"quoted"', "5\tfive", '6\t6" pipe']
    want = ['"an open quote', "two", "three", '"quoted"', "five", '6" pipe']
    assert values(tmp_path / "a.tsv", "\n".join(lines)) == want
    assert values(tmp_path / "b.tsv", "\r\n".join(lines) + "\r\n") == want


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('id,text\n1,one\n2,"two\n3,three\n4,four\n', 3),  # open at the end
        ('id,text\n1,"one\nand more"\n2,"two\n3,"three"\n4,four\n', 4),  # closed by the next quote
        ('"id,text\n1,one\n', 1),
    ],
)
def test_an_unclosed_quote_in_a_csv_is_an_error_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(SourceError, match=rf"a\.csv: the record that begins in line {line} is not CSV .*not closed"):
        values(tmp_path / "a.csv", text)


def test_closed_quotes_in_a_csv_keep_their_text(tmp_path: Path) -> None:
    text = 'id,text\n1,"one ""and"" more,\nin two lines"\n\n2,an "inner" quote\n'
    assert values(tmp_path / "a.csv", text) == ['one "and" more,\nin two lines', 'an "inner" quote']


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_delimiter_of_a_csv_is_that_of_its_header(tmp_path: Path, delimiter: str) -> None:
    text = f'id{delimiter}"title, short"{delimiter}text\n1{delimiter}t{delimiter}one, two; three\n'.replace("; ", ", ")
    assert values(tmp_path / "a.csv", text) == ["one, two, three"]
    assert values(tmp_path / "b.csv", f"sep={delimiter}\nn{delimiter}text\n1{delimiter}one\n") == ["one"]


def test_the_first_text_of_a_table_without_a_header_is_not_lost(tmp_path: Path) -> None:
    for name in ("a.csv", "a.tsv"):
        with pytest.raises(SourceError, match=r"one column, and its first line 'the first text' may be a name or the"):
            values(tmp_path / name, "the first text\nthe second\n")
    assert values(tmp_path / "a.csv", "lyrics\nla\n", text_columns=("lyrics",)) == ["la"]
    assert values(tmp_path / "a.csv", "\ufeffSentence\r\nla\r\n") == ["la"]


def test_a_record_with_more_cells_than_columns_is_counted_not_cut(tmp_path: Path) -> None:
    text = "id,text\n1,Hello, world\n2,fine\n3,trailing,,\n4\n"
    assert values(tmp_path / "a.csv", text) == [Unfit.MALFORMED, "fine", "trailing", None]


def test_replaced_bytes_of_tables_are_counted(tmp_path: Path) -> None:
    found = records(tmp_path / "a.csv", b"id,text\n1,caf\xe9\n2,tea\n")
    assert [(r.value, r.repaired) for r in found] == [("caf\ufffd", True), ("tea", False)]
    found = records(tmp_path / "a.jsonl", b'{"text": "caf\xe9"}\n{"text": "tea"}\n')
    assert [(r.value, r.repaired) for r in found] == [("caf\ufffd", True), ("tea", False)]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_with_its_mark_is_read(tmp_path: Path, encoding: str) -> None:
    """As Excel writes "Unicode text" and PowerShell its output."""
    mark = "\ufeff"
    assert values(tmp_path / "a.txt", f"{mark}käse\n".encode(encoding)) == ["käse\n"]
    assert values(tmp_path / "a.csv", f"{mark}id;text\r\n1;käse\r\n".encode(encoding)) == ["käse"]
    (tmp_path / "b.txt").write_bytes(f"{mark}a".encode(encoding) + b"\xd8\xd8\xd8\xd8\0")
    assert to_document(0, *FileSource(TextConfig(str(tmp_path / "b.txt"))).records(0), join_chat).skipped == "binary"


NESTED = [
    {"id": 1, "data": {"text": "one", "tags": ["a", "b"]}, "parts": ["first", None, "second"]},
    {"id": 2, "data": None, "parts": []},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_columns_in_columns_and_lists_of_strings(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(NESTED), path)
        data: str | bytes = path.read_bytes()
    else:
        data = json.dumps(NESTED) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in NESTED)
    assert values(path, data, text_columns=("data.text",)) == ["one", None]
    found = [to_document(0, record, join_chat) for record in records(path, data, text_columns=("parts",))]
    assert [(d.text, d.skipped) for d in found] == [("first\nsecond", None), ("", "none")]
    assert values(path, data, text_columns=("data.text", "data.tags")) == ["one\na\nb", None]
    with pytest.raises(
        SourceError, match=r"no column 'data\.txt'; its columns are id, data, data\.text, data\.tags, par"
    ):
        values(path, data, text_columns=("data.txt",))


def test_the_only_text_inside_of_a_column_is_found(tmp_path: Path) -> None:
    assert FileSource(TextConfig(str(put(tmp_path / "a.jsonl", {"id": 1, "data": {"text": "t"}})))).columns == (
        "data.text",
    )
    assert FileSource(TextConfig(str(put(tmp_path / "b.jsonl", {"id": 1, "lines": ["a", "b"]})))).columns == ("lines",)
    row = {"id": 1, "lyrics": "la", "meta": {"text": "no", "lang": "en"}}
    assert FileSource(TextConfig(str(put(tmp_path / "c.jsonl", row)))).columns == ("lyrics",)


def put(path: Path, row: dict[str, object]) -> Path:
    path.write_text(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_two_columns_of_one_name_are_refused_if_they_are_the_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for twice, wanted in (("text", None), ("id", ["one", "two"])):
        names = ["text", twice, "id"]
        rows = [["one", "1", "a"], ["two", "2", "b"]]
        table = pyarrow.table([pyarrow.array(cells) for cells in zip(*rows, strict=True)], names=names)
        objects = ["{" + ", ".join(f'"{k}": "{v}"' for k, v in zip(names, row, strict=True)) + "}" for row in rows]
        if name == "a.parquet":
            pyarrow.parquet.write_table(table, path)
        elif name == "a.arrow":
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        elif name.startswith("a.json"):
            path.write_text("\n".join(objects) if name == "a.jsonl" else f"[{', '.join(objects)}]")
        else:
            path.write_text("\n".join(",\t"[name == "a.tsv"].join(r) for r in [names, *rows]))
        if wanted is None:
            with pytest.raises(SourceError, match=r"has two columns 'text': rename one of them"):
                values(path, path.read_bytes())
        else:
            assert values(path, path.read_bytes()) == wanted


def test_a_record_with_its_text_twice_is_counted_not_halved(tmp_path: Path) -> None:
    lines = ['{"text": "one"}'] * 150 + ['{"text": "two", "text": "three"}', '{"text": "four"}']
    assert values(tmp_path / "a.jsonl", "\n".join(lines))[150:] == [Unfit.MALFORMED, "four"]


def test_only_line_feeds_end_records(tmp_path: Path) -> None:
    odd = "a\u2028b\u2029c\x85d\x0be\x0cf\rg"  # datasets#622, datasets#3729
    for delimiter, name in ((",", "a.csv"), ("\t", "a.tsv")):
        for end in ("\n", "\r\n"):
            lines = [f"id{delimiter}text", f"1{delimiter}{odd}", f"2{delimiter}two", ""]
            assert values(tmp_path / name, end.join(lines)) == [odd, "two"]
    assert values(tmp_path / "b.csv", f'id,text\n1,"{odd}\r\nh"\n2,two\n') == [f"{odd}\r\nh", "two"]
    assert values(tmp_path / "c.csv", "id,text\r1,one\r2,two\r") == ["one", "two"]  # as on an old Mac
    objects = [json.dumps({"text": text}, ensure_ascii=False) for text in (odd, "two")]
    for name in ("a.jsonl", "a.json"):
        assert values(tmp_path / name, "\n".join(objects)) == [odd, "two"]
    assert values(tmp_path / "a.txt", f"{odd}\ntwo\n", documents="line") == [odd, "two"]


def test_words_that_other_readers_take_for_nothing_are_text(tmp_path: Path) -> None:
    words = ["null", "NA", "NaN", "None", "nan", "#N/A", "true", "007"]  # datasets#4467
    lines = [f"{i},{word}" for i, word in enumerate(words)]
    assert values(tmp_path / "a.csv", "\n".join(["id,text", *lines])) == words


@pytest.mark.parametrize(
    "value",
    [
        {"id": [1, 2], "text": ["one", "two"]},  # as Dataset.to_dict and pandas' orient="list"
        {"columns": ["id", "text"], "index": [0, 1], "data": [[1, "one"], [2, "two"]]},  # orient="split"
        {"version": "1", "rows": [{"text": "one"}, {"text": "two"}]},
    ],
)
def test_a_json_file_of_columns_is_a_table(tmp_path: Path, value: object) -> None:
    assert values(tmp_path / "a.json", json.dumps(value)) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_put_one_after_the_other_are_one(tmp_path: Path, suffix: str) -> None:
    codec = pyarrow.Codec({".gz": "gzip", ".zst": "zstd"}[suffix])
    parts = [codec.compress(f'{{"text": "{i}"}}\n'.encode(), asbytes=True) for i in range(3)]
    path = tmp_path / f"a.jsonl{suffix}"
    assert values(path, b"".join(parts)) == ["0", "1", "2"]
    with pytest.raises(SourceError, match="cannot be read"):
        values(path, b"".join(parts)[:-5])


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_file_names_that_are_no_utf8(tmp_path: Path) -> None:
    for name in (b"caf\xe9.txt", b"caf\xe8.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("tea")
    source = FileSource(TextConfig(str(tmp_path)))
    assert [record.source for record in source.records(0)] == ["caf\\xe8.txt", "caf\\xe9.txt"]
    assert source.identity["dataset_full_xxh3"]
    one = FileSource(TextConfig(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")))
    assert one.name.endswith("caf\\xe9.txt")


READ = """
import resource, sys
from sae_granary.harvest.config import TextConfig
from sae_granary.harvest.text.local_files import FileSource
import pyarrow, xxhash
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
for path in sys.argv[1:]:
    try:
        print([r.value if isinstance(r.value, str) else r.value.name for r in FileSource(TextConfig(path)).records(0)])
    except Exception as error:
        print(type(error).__name__, error)
"""


def bomb(path: Path, before: bytes, after: bytes, n_mib: int) -> str:
    path.write_bytes(gzip.compress(before) + gzip.compress(b"a" * (1 << 20), 1) * n_mib + gzip.compress(after))
    return str(path)


def test_a_record_that_unpacks_to_much_is_skipped_and_counted(tmp_path: Path) -> None:
    lines = bomb(tmp_path / "a.jsonl.gz", b'{"text": "one"}\n{"text": "', b'"}\n{"text": "two"}\n', 260)
    assert values_of(lines) == ["one", Unfit.TOO_LARGE, "two"]


def values_of(path: str) -> list[object]:
    return [record.value for record in FileSource(TextConfig(path)).records(0)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="an address space limit")
def test_what_unpacks_to_gigabytes_is_skipped_in_a_gibibyte_of_memory(tmp_path: Path) -> None:
    lines = run_python(
        READ,
        bomb(tmp_path / "a.jsonl.gz", b'{"text": "one"}\n{"text": "', b'"}\n{"text": "two"}\n', 1500),
        bomb(tmp_path / "a.txt.gz", b"", b"", 1500),
        bomb(tmp_path / "a.json.gz", b'[{"text": "', b'"}]', 1500),
        bomb(tmp_path / "a.csv.gz", b"id,text\n1,", b"\n", 300),
    ).stdout.splitlines()
    assert lines[:2] == ["['one', 'TOO_LARGE', 'two']", "['TOO_LARGE']"]
    for line, name in zip(lines[2:], ("a.json.gz", "a.csv.gz"), strict=True):
        assert line.startswith(("SourceError", "SourceStoppedError"))
        assert name in line


def test_a_large_window_of_zstd_is_told_with_its_remedy(tmp_path: Path) -> None:
    text = b"some text"
    window_2_gib, last_raw_block = bytes([0, 21 << 3]), (len(text) << 3 | 1).to_bytes(3, "little")
    frame = b"\x28\xb5\x2f\xfd" + window_2_gib + last_raw_block + text
    with pytest.raises(SourceError, match=r"a\.txt\.zst cannot be read: .*decompress it first: zstd -d --long=31 .*"):
        values(tmp_path / "a.txt.zst", frame)


def test_times_of_any_kind_beside_the_text(tmp_path: Path) -> None:
    late = pyarrow.array([10**18 + 1])  # after the year 9999, or with nanoseconds, which Python's times have not
    times = {
        "a": late.view("timestamp[us]"), "b": late.view("timestamp[ns]"), "c": late.view("duration[ns]"),
        "d": pyarrow.array([2**31 - 1], pyarrow.int32()).view(pyarrow.date32()), "e": late.view("time64[ns]"),
    }  # fmt: skip
    inner = pyarrow.StructArray.from_arrays(list(times.values()), names=list(times))
    table = pyarrow.table({"text": ["one"], **times, "f": inner, "g": pyarrow.ListArray.from_arrays([0, 1], inner)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for path in tmp_path.glob("a.*"):
        assert values(path, path.read_bytes()) == ["one"]
        assert values(path, path.read_bytes(), text_columns=("text",)) == ["one"]


def test_a_column_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"--text-column a,b,a names a column twice"):
        values(tmp_path / "a.jsonl", '{"a": "x", "b": "y"}', text_columns=("a", "b", "a"))
