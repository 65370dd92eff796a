"""The frozen caches of format 1 in tests/data open forever, and today's writer still writes the same bytes.

`python tests/test_cache_format.py` made them; a format that writes other bytes is a new version with caches of its own.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_kit import make_rows

from sae_granary import open_cache
from sae_granary.cache.errors import UnsupportedFormatError
from sae_granary.cache.format import signed
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.format.storage import STORAGE
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.rows import FLAG_SPECIAL, FLAG_WINDOW_START, DocumentRow, HookPoint

FROZEN = Path(__file__).parent / "data" / "format1_tiny"
N_ROWS, WINDOW, D_IN = 25, 5, 4
KEPT = ({"ticket id": "T0", "text": "ünïcode", "a.b": 2.5}, {"ticket id": 7, "text": None, "a.b": True})


def rows_of(hooks):
    """25 rows: five windows of five, of two documents."""
    row = np.arange(N_ROWS)
    position = row % WINDOW
    special = (position == 0) | (position == WINDOW - 1)
    flags = special * FLAG_SPECIAL + (position == 0) * FLAG_WINDOW_START
    values = {
        hook: (row[:, None] - 8 + np.arange(D_IN) / 4 + 32 * k).astype(np.float32) for k, hook in enumerate(hooks)
    }
    return make_rows(
        values, token_id=np.where(special, 0, 1 + row % 3), doc_id=np.where(row < 15, 0, 2), window=row // WINDOW,
        position=position, doc_position=np.where(special, -1, position - 1), flags=flags,
    )  # fmt: skip


def write(path, dtype, columns=((), ()), **model):
    """A cache whose two documents keep `columns` (a mapping each); `model` is more of its record of the model."""
    hooks = ("layer_0", "layer_1.mlp.in")
    spec = CacheSpec(
        unit="token",
        hook_points=(
            HookPoint("layer_0", "encoder.layer.0", "output", 0, D_IN),
            HookPoint("layer_1.mlp.in", "encoder.layer.1.mlp", "input", None, D_IN),
        ),
        dtype=dtype,
        rows_per_shard=12,  # two windows and two rows that stay empty
        provenance={"model": {"id": "tiny", "revision": None, **model}, "dataset": {"id": "counting"}},
        fingerprint={"model": "tiny", "dataset": "counting"},
        vocabulary=["[CLS]", "one", "two", "##s"],
        inner_chunk_bytes=4 * D_IN * STORAGE[dtype].item_bytes,
        kept_columns=tuple(columns[0]),
    )
    first, second = map(dict, columns)
    documents = [DocumentRow(0, "counting", 0, "one two ones", first), DocumentRow(2, "counting", 2, "zwölf", second)]
    with CacheWriter.open(path, spec) as writer:
        writer.begin_buffer({"next_document": 0})
        writer.append(rows_of(hooks), documents)
        writer.finish({"documents": 2, "skipped_empty": 1})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cache_of_format_1_opens_for_ever(dtype):
    opened = open_cache(FROZEN / dtype)
    assert opened.complete
    assert opened.dtype == dtype
    assert [(s.index, s.n_rows, s.first_row_id) for s in opened.shards] == [(0, 10, 0), (1, 10, 12), (2, 5, 24)]
    expected = rows_of(opened.hook_points)
    for hook, values in expected.activations.items():
        assert (opened.hook(hook)[:].astype(np.float32) == values).all()
        np.testing.assert_allclose(opened.norms(hook)[:], np.linalg.norm(values, axis=1), rtol=1e-6)
        np.testing.assert_allclose(opened.stats(hook).mean, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(opened.stats(hook).var, values.var(axis=0), rtol=1e-6)
    for name in ("token_id", "doc_id", "window", "position", "doc_position", "flags"):
        assert (opened.column(name)[:] == getattr(expected, name)).all()
    assert opened.hook_points["layer_1.mlp.in"] == HookPoint(
        "layer_1.mlp.in", "encoder.layer.1.mlp", "input", None, D_IN
    )
    assert opened.document(20) == DocumentRow(2, "counting", 2, "zwölf")
    assert opened.context(2, before=1, after=1).text == "twos one"
    assert opened.manifest.summary == {"documents": 2, "skipped_empty": 1}
    assert opened.records[1].cursor.source == {"next_document": 0}
    assert opened.records[1].cursor.rows_into_buffer == 20
    report = verify(FROZEN / dtype)
    assert report.problems == ()
    assert report.foreign == ()


def test_a_cache_of_format_1_with_kept_columns_opens_for_ever():
    opened = open_cache(FROZEN / "kept_columns")
    assert (opened.kept_columns, opened.document_ids()) == (tuple(KEPT[0]), [0, 2])
    assert [opened.find_document(0).columns, opened.find_document(2).columns] == list(KEPT)
    assert opened.document_column("text") == ["ünïcode", None]
    assert verify(FROZEN / "kept_columns").problems == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_writer_still_writes_format_1(tmp_path, dtype):
    write(tmp_path / "new", dtype)
    frozen = {str(p.relative_to(FROZEN / dtype)): p for p in (FROZEN / dtype).rglob("*") if p.is_file()}
    written = {str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert written == set(frozen)
    # Parquet files name the version of their writer; what is in them is compared by reading, above.
    compared = [name for name in frozen if name.split("/")[0] in {"activations", "rows", "norms", "zarr.json"}]
    assert len(compared) > 30
    for name in compared:
        assert (tmp_path / "new" / name).read_bytes() == frozen[name].read_bytes(), name


def test_versions_that_would_load_the_model_with_all_its_bits_refuse_the_cache(tmp_path, monkeypatch):
    write(tmp_path / "whole", "float32")
    write(tmp_path / "bits", "float32", load_in="8bit")
    assert json.loads((tmp_path / "whole/commits/00000000.json").read_bytes())["version"] == 1
    assert json.loads((tmp_path / "bits/commits/00000000.json").read_bytes())["version"] == 4
    assert json.loads((tmp_path / "bits/zarr.json").read_bytes())["attributes"]["version"] == 4
    opened = open_cache(tmp_path / "bits")
    assert (opened.manifest.model["load_in"], opened.manifest.block_docs) == ("8bit", None)
    assert verify(tmp_path / "bits").ok
    monkeypatch.setattr(signed, "VERSIONS", (1, 2, 3))  # what they check
    open_cache(tmp_path / "whole")
    with pytest.raises(UnsupportedFormatError, match="cache format 4; this version reads formats 1 to 3: update"):
        open_cache(tmp_path / "bits")


if __name__ == "__main__":
    for name, options in {"bfloat16": (), "float32": (), "kept_columns": (KEPT,)}.items():
        if (FROZEN / name).exists() and "--again" in sys.argv:
            shutil.rmtree(FROZEN / name)
        write(FROZEN / name, "float32" if options else name, *options)
