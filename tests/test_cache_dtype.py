"""A new dtype is one object: float64, registered here, is written, read, verified and loaded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cache_kit import toy_rows, toy_spec

from sae_granary import open_cache
from sae_granary.cache.errors import BadActivationError, SpecError
from sae_granary.cache.format.storage import STORAGE, Storage
from sae_granary.cache.load.loader import Loader
from sae_granary.cache.load.selection import Selection
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write.writer import CacheWriter


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setitem(STORAGE, "float64", Storage("float64", "<f8"))


def test_an_unknown_dtype_is_refused_with_the_known_ones():
    with pytest.raises(SpecError, match="dtype is 'float64', expected one of float32, float16, bfloat16"):
        toy_spec("float64")


@pytest.mark.usefixtures("float64")
def test_a_registered_dtype_is_written_read_verified_and_loaded(tmp_path):
    path = tmp_path / "toy"
    rows = toy_rows(dtype=np.float64)
    exact = {hook: values + 1e-12 for hook, values in rows.activations.items()}  # float32 would lose this
    with CacheWriter.open(path, toy_spec("float64", rows_per_shard=1024)) as writer:
        writer.begin_buffer({})
        writer.append(replace(rows, activations=exact))
        writer.finish({})
    opened = open_cache(path)
    stored = opened.hook("layer_1")[:]
    assert stored.dtype == np.float64
    assert (stored == exact["layer_1"]).all()
    assert verify(path).ok
    options = {"dtype": torch.float64, "selection": Selection(part="all"), "with_rows": True}
    with Loader(opened, "layer_1", batch_size=32, epochs=1, **options) as loader:
        for batch in loader:
            assert (batch.x.numpy() == stored[batch.row_ids.numpy()]).all()


@pytest.mark.usefixtures("float64")
def test_it_is_checked_and_named_as_the_remedy_of_a_narrower_one(tmp_path):
    rows = toy_rows(dtype=np.float64)
    for dtype, value, message in [
        ("float64", np.nan, "value nan; check the model's compute dtype"),
        ("float32", 1e39, r"1e\+39 is out of the range of float32; store a wider dtype \(--dtype float64\)"),
        ("float16", 1e5, r"store a wider dtype \(--dtype bfloat16 or float32 or float64\)"),
    ]:
        rows.activations["layer_3"][7, 2] = value
        with CacheWriter.open(tmp_path / dtype, toy_spec(dtype, rows_per_shard=1024)) as writer:
            writer.begin_buffer({})
            with pytest.raises(BadActivationError, match=message):
                writer.append(rows)
