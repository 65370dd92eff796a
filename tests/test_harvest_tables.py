"""Tables as they are: quotes, delimiters, headers and bytes of .csv and .tsv files, and records that do not fit."""

from pathlib import Path

import pytest

from sae_granary.harvest.config import TextConfig
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.document import Record, Unfit
from sae_granary.harvest.text.local_files import FileSource


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
