"""A folder is read as its owner means it, and what is left out is listed with the reason."""

import os
import re
from pathlib import Path

import pytest

from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import TextConfig
from sae_granary.harvest.errors import SourceError
from sae_granary.harvest.text.document import TextSource
from sae_granary.harvest.text.sources import open_source


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(folder: Path, **options: object) -> tuple[list[tuple[str, object]], str]:
    """(source, text) of every record, and what was said."""
    said: list[str] = []
    source: TextSource = open_source(TextConfig(str(folder), **options), said.append)
    return [(record.source, record.value) for record in source.records(0)], "\n".join(said)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/deep/b.txt", "b")
    put(tmp_path / "data/a/a.txt", "a")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/again").symlink_to("a")
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/loop").symlink_to(".")
    found, said = read(tmp_path / "data")
    assert found == [("a/a.txt", "a"), ("linked/deep/b.txt", "b")]
    assert "again, linked/deep/up, linked/loop (a link to a folder that is read already)" in said


def test_what_is_left_out_is_listed_with_the_reason(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "a")
    for name in ("1.pdf", "2.pdf", "3.pdf", "4.pdf", "Makefile", ".git/config", "README.md"):
        put(tmp_path / name, "no")
    put(tmp_path / "old/manifest.json", '{"format": "granary-activations"}')
    os.mkfifo(tmp_path / "pipe.txt")
    found, said = read(tmp_path)
    assert found == [("a.txt", "a")]
    for words in (
        "reading 1 of the files in", "1.pdf, 2.pdf, 3.pdf and 1 more (unknown ending .pdf)", "Makefile (no ending)",
        ".git (hidden)", "README.md (about the data)", "old (an activation cache)", "pipe.txt (no regular file)",
    ):  # fmt: skip
        assert words in said
    (tmp_path / "a.txt").unlink()
    (tmp_path / "README.md").unlink()
    with pytest.raises(SourceError, match=r"holds no \.txt.* files; left out: .*unknown ending \.pdf"):
        read(tmp_path)


def test_a_readme_among_documents_of_its_kind_is_a_document(tmp_path: Path) -> None:
    put(tmp_path / "README.md", "first")
    put(tmp_path / "guide.md", "second")
    assert read(tmp_path) == ([("README.md", "first"), ("guide.md", "second")], "")
    put(tmp_path / "data.jsonl", '{"text": "third"}\n')
    put(tmp_path / "license.txt", "do not")
    found, said = read(tmp_path)
    assert found == [("data.jsonl", "third"), ("guide.md", "second")]
    assert "README.md, license.txt (about the data)" in said


@pytest.mark.parametrize(
    "names", [("train.jsonl", "test.jsonl"), ("data/train-0-of-1.jsonl", "data/test-0-of-1.jsonl")]
)
def test_of_several_splits_one_is_read(tmp_path: Path, names: tuple[str, str]) -> None:
    train, test = names
    put(tmp_path / train, '{"text": "learn"}\n')
    put(tmp_path / test, '{"text": "check"}\n')
    found, said = read(tmp_path)
    assert found == [(train, "learn")]
    assert f"{test} (split test)" in said
    assert read(tmp_path, split="test")[0] == [(test, "check")]
    assert read(tmp_path, split="all")[0] == sorted([(train, "learn"), (test, "check")])
    with pytest.raises(SourceError, match=r"holds the splits test, train: name one with --split, or all"):
        read(tmp_path, split="validation")


def test_without_a_train_split_one_must_be_named(tmp_path: Path) -> None:
    put(tmp_path / "dev/a.txt", "a")
    put(tmp_path / "eval.txt", "b")
    with pytest.raises(SourceError, match=r"holds the splits test, validation: name one"):
        read(tmp_path)
    assert read(tmp_path, split="validation")[0] == [("dev/a.txt", "a")]
    put(tmp_path / "contest.txt", "c")  # no name of a split: these are just files
    assert len(read(tmp_path)[0]) == 3
    with pytest.raises(ConfigError, match=r"--split test does not apply to .*without several splits"):
        read(tmp_path, split="test")


def test_data_sets_saved_to_disk_are_read(tmp_path: Path) -> None:
    import datasets

    texts = [f"text {i}" for i in range(2500)]
    whole = datasets.Dataset.from_dict({"text": texts, "n": range(2500)})
    whole.select(range(2499, -1, -1)).save_to_disk(tmp_path / "one", num_shards=2)
    found, said = read(tmp_path / "one")
    assert [text for _, text in found] == texts[::-1]
    assert "dataset_info.json, state.json (describes the dataset)" in said
    parts = {"train": whole.select(range(3)), "extra": whole.select(range(3, 5))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    assert [text for _, text in read(tmp_path / "dict")[0]] == texts[:3]
    assert [text for _, text in read(tmp_path / "dict", split="extra")[0]] == texts[3:5]


def test_what_datasets_leaves_beside_a_saved_data_set_is_no_part_of_it(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(6)], "n": range(6)})
    whole.save_to_disk(tmp_path / "one")
    opened = datasets.load_from_disk(str(tmp_path / "one"))
    opened.map(lambda record: {"text": record["text"].upper()})  # cache-....arrow beside the data
    opened.filter(lambda record: record["n"] < 3)
    found, said = read(tmp_path / "one")
    assert [text for _, text in found] == whole["text"]
    assert re.search(r"cache-\w+.arrow, cache-\w+.arrow \(left over beside the saved dataset\)", said)
    whole.save_to_disk(tmp_path / "again", num_shards=2)
    whole.select([4, 2]).save_to_disk(tmp_path / "again", num_shards=1)
    assert [text for _, text in read(tmp_path / "again")[0]] == ["text 4", "text 2"]
    (tmp_path / "again" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(SourceError, match=r"1 of the 1 files that .*state.json lists are missing"):
        read(tmp_path / "again")
    put(tmp_path / "one" / "state.json", '{"_indices_data_files": [{"filename": "indices.arrow"}], "_data_files": []}')
    with pytest.raises(SourceError, match=r"indices.arrow selects: load and save it again"):
        read(tmp_path / "one")


def test_results_in_the_cache_of_datasets_are_left_out(tmp_path: Path) -> None:
    import datasets

    put(tmp_path / "a.jsonl", '{"text": "as it is"}')
    config = {"data_files": str(tmp_path / "a.jsonl"), "cache_dir": str(tmp_path / "cache"), "split": "train"}
    loaded = datasets.load_dataset("json", **config)
    loaded.map(lambda record: {"text": record["text"].upper()})
    folder = Path(loaded.cache_files[0]["filename"]).parent
    assert len(list(folder.glob("*.arrow"))) == 2
    assert [text for _, text in read(folder)[0]] == ["as it is"]
