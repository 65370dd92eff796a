"""`sae-analyze search`: documents by a latent against a naive reference, and the values of a kept column by lift."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_kit import invoke, refused
from sae_kit import saved

from sae_granary.analyze.cli import app
from sae_granary.analyze.encoding import codes as codes_module
from sae_granary.analyze.encoding.codes import open_codes
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.encoding.outputs import Output, write_cache_codes
from sae_granary.analyze.latents import search as search_module
from sae_granary.analyze.latents.labels import document_labels
from sae_granary.analyze.latents.search import Found, Group, document_lines, group_lines, groups, pool_latent
from sae_granary.analyze.source import Source, open_source
from sae_granary.common.rows import FLAG_SPECIAL, DocumentRow

COLUMNS: dict[str, tuple[Any, ...]] = {
    "ticket": tuple(f"T{i}" for i in range(40)), "category": ("billing", "\x1b[2J<b>login</b>\nnow", None),
}  # fmt: skip


@pytest.fixture
def source(make_cache, tmp_path: Path) -> Source:
    """A cache of 40 documents with two columns, and an SAE with activations of both signs."""
    folder = saved(tmp_path / "sae", "abstopk", d_sae=24, k=2)
    return open_source(folder, make_cache(n_docs=40, columns=COLUMNS), device="cpu")


@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
def test_pooled_activations_are_those_of_a_loop(source: Source, tmp_path: Path, pool: str, monkeypatch) -> None:
    monkeypatch.setattr(search_module, "BLOCK_ROWS", 100)
    monkeypatch.setattr(codes_module, "CHUNK", 37)
    codes = encode_cache(source, tmp_path / "codes")
    dense, document = codes.dense().astype(np.float64), source.cache.column("doc_id")[:]
    plain = source.cache.column("flags")[:] & FLAG_SPECIAL == 0
    write_cache_codes(source, codes, Output(tmp_path / "pooled", pool=pool))
    pooled = open_codes(tmp_path / "pooled")
    for latent in (3, 17):
        found = pool_latent(source.cache, codes, latent, pool)
        assert found.doc_id.tolist() == list(range(40))
        for doc, value in enumerate(found.pooled):
            rows = dense[(document == doc) & plain, latent]
            want = rows[np.argmax(np.abs(rows))] if pool == "max" else getattr(rows, pool)()
            np.testing.assert_allclose(value, want, atol=1e-12)
        np.testing.assert_allclose(found.pooled, pooled.dense()[:, latent], rtol=1e-6)  # what `encode --pool` writes
        strongest = np.abs(found.pooled[found.strongest(5)])
        np.testing.assert_array_equal(strongest, np.sort(np.abs(found.pooled))[::-1][:5])


def test_groups_by_hand() -> None:
    found = Found(np.array([2, 3, 5, 9]), np.ones(4, np.int64), np.array([0.0, 2.0, 1.0, 0.0]))
    table = groups(found, [2, 3, 4, 5, 9], [1, True, "not in the rows", True, 1])
    assert table == [Group(True, 2, 1.0, 1.5, 2.0), Group(1, 2, 0.0, 0.0, 0.0)]
    assert found.strongest(3).tolist() == [1, 2]
    lines = list(group_lines("paid", table, top=1))
    assert [line.split() for line in lines] == [
        ["paid", "documents", "active", "mean", "lift"], ["true", "2", "100.0%", "1.5", "2.00"],
        ["and", "1", "more", "value"],
    ]  # fmt: skip


def test_hostile_names_stay_in_one_line() -> None:
    document = DocumentRow(0, "a\nb.csv", 0, "text", {"a\n\x1b[2J": "\u202e" + "x" * 1000, "b": 2.5})
    assert document_labels(document) == [r"a \x1b[2J=" + r"\u202e" + "x" * 36 + "...", "b=2.5"]
    assert document_labels(DocumentRow(0, "a\nb.csv", 0, "text")) == ["a b.csv"]
    assert next(group_lines("a\nb", [], 1)).startswith("a b  documents")


def test_a_latent_that_never_fires(source: Source, tmp_path: Path) -> None:
    with torch.no_grad():
        source.sae.W_enc[:, 5] = 0
    found = pool_latent(source.cache, encode_cache(source, tmp_path / "codes"), 5)
    assert not found.active.any()
    assert list(document_lines(source.cache, found, 5)) == []
    table = groups(found, source.cache.document_ids(), source.cache.document_column("ticket"))
    assert {group.lift for group in table} == {0}


def test_the_command(source: Source) -> None:
    args = ["search", str(source.folder), "--cache", str(source.cache.path), "--latent", "17", "--device", "cpu"]
    result = invoke(app, *args, "--by", "category", "--top", "3")
    lines = result.stdout.splitlines()
    assert lines[0] == "latent 17: active in 38 of 40 documents (95.00%), pooled by max"
    assert lines[2].split() == ["category", "documents", "active", "mean", "lift"]
    assert {line.split()[0] for line in lines[3:6]} == {"billing", r"\x1b[2J<b>login</b>", "null"}  # one line, inert
    assert [float(line.split()[0]) for line in lines[7:]] != []
    assert all("ticket=T" in line and "category=" in line and "document " in line for line in lines[7:10])
    assert len(lines) == 10
    assert (source.place / "codes" / "record.json").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--latent 24", "error: --latent is 24, expected 0 to 23"),
        ("--latent -1", "error: --latent is -1, expected 0 to 23"),
        ("--latent 1 --by categories", "keeps no column 'categories' of its documents, did you mean 'category'?: it "
         "keeps ticket, category; harvest again with --keep-columns"),
        ("--latent 1 --pool median", "error: pool='median': expected one of max, mean, sum"),
        ("--latent 1 --top 0", "error: top=0: expected a value >= 1"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_encoded(source: Source, flags: str, message: str) -> None:
    args = ["search", str(source.folder), "--cache", str(source.cache.path), *flags.split()]
    assert message in refused(app, *args)
    assert not source.place.exists()
