"""sae_granary.batches and BatchDataset: the loader for other people's loops."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sae_granary import BatchDataset, CacheWriter, batches
from sae_granary.cache.errors import SelectionError

X = np.arange(500 * 4, dtype=np.float32).reshape(500, 4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("public") / "c"
    with CacheWriter(path, d_in=4, rows_per_shard=128) as writer:
        writer.add(X)
    return path


def test_an_epoch_delivers_every_row_once_in_another_order(cache):
    with batches(cache, batch_size=64, epochs=1) as loader:
        got = [batch.x for batch in loader]
    assert [len(x) for x in got] == [64] * 7 + [52]
    rows = torch.cat(got).numpy()
    assert not np.array_equal(rows, X)
    np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], X)


def test_a_state_continues_exactly(cache):
    with batches(cache, batch_size=64) as loader:
        states = [next(loader) for _ in range(12)]
    with batches(cache, batch_size=64, state=states[4].state) as loader:
        assert all(torch.equal(next(loader).x, batch.x) for batch in states[5:])


def test_the_split_is_that_of_training(cache):
    n = {}
    for part in ("all", "train", "heldout"):
        with batches(cache, batch_size=8, epochs=1, part=part) as loader:
            n[part] = sum(len(batch.x) for batch in loader)
    assert n["train"] + n["heldout"] == n["all"] == 500
    assert 0 < n["heldout"] < 100


def test_the_dataset_feeds_a_data_loader_and_continues(cache):
    data = BatchDataset(cache, batch_size=64, epochs=1)
    first = next(iter(DataLoader(data, batch_size=None)))
    rest = list(DataLoader(data, batch_size=None))
    assert sum(map(len, rest)) == 500 - 64
    assert torch.equal(next(iter(BatchDataset(cache, batch_size=64, epochs=1))), first)
    with pytest.raises(SelectionError, match="num_workers"):
        next(iter(DataLoader(data, batch_size=None, num_workers=1)))
