"""Files of texts: which text has which number, what is skipped, what is refused."""

import io
from pathlib import Path

import pytest

from sae_granary.analyze.encoding.text_files import read_texts
from sae_granary.common.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "data", "column", "expected"),
    [
        ("a.txt", b"\xef\xbb\xbfone\r\n\ntwo \xff\n", None, {0: "one", 2: "two \ufffd"}),
        ("a", b"one\n\0\0\0\n", None, {0: "one"}),  # binary
        ("a.jsonl", b'{"text": "one", "n": 1}\n\n{"text": null}\n{"n": 2}\n{"text": 3}\n', None, {0: "one"}),
        ("a.jsonl", b'{"body": "one\\u2028two"}\r\n{"body": "\\ud800"}\n', "body", {0: "one\u2028two", 1: "\ufffd"}),
        ("a.csv", b'id,body\n1,"one, ""two""\nthree"\n2,\n3,four\n', "body", {0: 'one, "two"\nthree', 2: "four"}),
        ("a.csv", b"id;text\n1;one\n", None, {0: "one"}),
        ("a.csv", b"ticket\none\n", None, {0: "one"}),
        ("a.tsv", b"id\ttext\n1\tone, two\n", None, {0: "one, two"}),
        ("a.txt", b"", None, {}),
        ("a.jsonl", b"", "body", {}),
    ],
)
def test_texts_of_a_file(tmp_path: Path, name: str, data: bytes, column: str | None, expected: dict[int, str]) -> None:
    (tmp_path / name).write_bytes(data)
    documents = list(read_texts(str(tmp_path / name), column))
    assert [document.doc_id for document in documents] == list(range(len(documents)))
    assert {document.doc_id: document.text for document in documents if document.skipped is None} == expected


def test_standard_input_holds_lines_or_json_lines() -> None:
    assert [d.text for d in read_texts("-", None, io.BytesIO(b'{"a": 1}\ntwo\n'))] == ['{"a": 1}', "two"]
    assert [d.text for d in read_texts("-", "a", io.BytesIO(b'{"a": "one"}\n'))] == ["one"]


@pytest.mark.parametrize(
    ("name", "data", "column", "words"),
    [
        ("a.parquet", b"", None, ".parquet is not read here, expected .txt"),
        ("a.txt", b"one\n", "body", "--text-column is 'body', but .*a.txt holds lines without columns"),
        ("a.csv", b"id,ticket\n1,a\n", None, "a.csv has the columns id, ticket: name that of the text with --text-col"),
        ("a.csv", b"id,ticket\n1,a\n", "text", "--text-column is 'text': .*a.csv has the columns id, ticket"),
        ("a.jsonl", b'\n["one"]\n', None, "a.jsonl, line 2: .*one.*, expected a JSON object in each line"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_at_once(
    tmp_path: Path, name: str, data: bytes, column: str | None, words: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        read_texts(str(tmp_path / name), column)
