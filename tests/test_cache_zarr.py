"""zarr-python and tensorstore read every array of a cache, equal to the memory map, in all dtypes."""

import numpy as np
import pytest
import tensorstore
import zarr
from cache_kit import DTYPES, harvest, toy_rows, toy_spec
from command_kit import run_python

from sae_granary import open_cache
from sae_granary.cache.format.layout import COLUMNS
from sae_granary.cache.format.storage import register_bfloat16
from sae_granary.common.rows import FLAG_ABSENT


@pytest.fixture(scope="module", params=sorted(DTYPES))
def opened(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("zarr") / request.param
    harvest(path, toy_spec(request.param, rows_per_shard=72))
    return open_cache(path)


def _absent(opened):
    absent = np.ones(len(opened.shards) * opened.manifest.rows_per_shard, dtype=bool)
    absent[opened.row_ids(np.arange(len(opened)))] = False
    assert absent.any()
    assert not absent[: opened.shards[0].n_rows].any()
    return absent


def _check(opened, name, values):
    absent = _absent(opened)
    kind, _, item = name.partition("/")
    ours = {"activations": opened.hook, "norms": opened.norms, "rows": opened.column}[kind](item)
    assert values.shape[0] == len(absent)
    assert values.dtype == ours.dtype
    assert values[~absent].tobytes() == ours[:].tobytes()
    if kind == "rows":
        assert (values[absent] == COLUMNS[item].fill).all()
    else:
        assert np.isnan(values[absent].astype(np.float32)).all()


def _names(opened):
    return [array.path for array in opened.layout.arrays]


def test_zarr_python_reads_every_array(opened):
    register_bfloat16()
    register_bfloat16()  # idempotent
    group = zarr.open_group(opened.path, mode="r")
    found = {name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert found == set(_names(opened))
    assert group.attrs["format"] == "granary-activations"
    for name in _names(opened):
        array = group[name]
        _check(opened, name, array[:])
        assert array.shards[0] == opened.manifest.rows_per_shard
        alone = zarr.open_array(opened.path / name, mode="r")
        assert alone[70:75].tobytes() == array[:][70:75].tobytes()


def test_tensorstore_reads_every_array(opened):
    for name in _names(opened):
        store = {"driver": "file", "path": str(opened.path / name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result()
        _check(opened, name, array.read().result())
        assert array.domain.labels[0] == "row"


def test_the_memory_map_holds_what_was_appended(opened):
    rows = toy_rows()
    for hook in opened.hook_points:
        stored = rows.activations[hook].astype(DTYPES[opened.dtype])
        assert opened.hook(hook)[:].tobytes() == stored.tobytes()
        norms = np.linalg.norm(stored.astype(np.float64), axis=1)
        np.testing.assert_allclose(opened.norms(hook)[:], norms, rtol=1e-6)
    for name in COLUMNS:
        assert (opened.column(name)[:] == getattr(rows, name)).all()
    assert len({shard.n_rows for shard in opened.shards}) > 1  # short shards in the middle
    assert not (opened.column("flags")[:] & FLAG_ABSENT).any()


def test_zarr_python_writes_the_same_data_bytes(opened, tmp_path):
    """Our files are what zarr-python itself would write for the same rows: data from byte 0, index at the end."""
    register_bfloat16()
    name = next(iter(opened.hook_points))
    theirs = zarr.open_array(opened.path / "activations" / name, mode="r")
    path = tmp_path / "copy"
    copy = zarr.create_array(
        path,
        shape=theirs.shape,
        dtype=theirs.dtype,
        chunks=theirs.chunks,
        shards=theirs.shards,
        compressors=None,
        filters=None,
        fill_value=theirs.fill_value,
        config={"write_empty_chunks": True},
    )
    copy[:] = theirs[:]
    whole = [shard for shard in opened.shards if shard.n_rows == opened.manifest.rows_per_shard]
    for shard in whole:
        ours = opened.shard_path(name, shard.index).read_bytes()
        assert (path / "c" / str(shard.index) / "0").read_bytes() == ours


def test_a_zarr_that_brings_its_own_bfloat16_keeps_it(monkeypatch):
    from zarr.core.dtype import data_type_registry

    monkeypatch.setitem(data_type_registry.contents, "bfloat16", "theirs")
    register_bfloat16()
    assert data_type_registry.contents["bfloat16"] == "theirs"


def test_zarr_writes_bfloat16_that_tensorstore_reads(tmp_path):
    run_python(
        """
import sys, numpy as np, ml_dtypes, zarr, tensorstore
from sae_granary.cache.format.storage import register_bfloat16
register_bfloat16()
values = np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16)
array = zarr.create_array(sys.argv[1], shape=(3, 4), dtype=values.dtype, chunks=(2, 4), compressors=None)
array[:] = values
store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": sys.argv[1]}}
assert (tensorstore.open(store).result().read().result() == values).all()
assert zarr.open_array(sys.argv[1])[:].dtype == values.dtype
""",
        tmp_path / "a",
    )
