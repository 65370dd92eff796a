"""`make bench-peers` compares like with like: SAELens' store gives our rows, and every contestant takes its steps."""

import argparse
import os
from itertools import islice
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.harvest_speed import random_rows
from benchmarks.peers import saelens_cache
from benchmarks.peers.contestants import contestants
from benchmarks.peers.memory import EnoughError
from benchmarks.peers.rows import rows
from benchmarks.peers.step import TYPES

ARGS = argparse.Namespace(cache=None, d_in=16, d_sae=64, k=4, batch_size=128, device="cpu", types=TYPES, autocast=False)


def test_saelens_store_gives_the_rows_written(tmp_path: Path) -> None:
    data = random_rows(64 * saelens_cache.CONTEXT, 16).activations["layer_6"]
    saelens_cache.write(data, tmp_path)
    in_order = saelens_cache.batches(tmp_path, 16, 1024, "cpu", buffer_rows=1024, mixing=0.0)
    epoch = torch.cat(list(islice(in_order, len(data) // 1024)))
    assert torch.equal(epoch, torch.from_numpy(data))
    mixed = next(saelens_cache.batches(tmp_path, 16, 1024, "cpu", buffer_rows=4096, mixing=0.5))
    assert mixed.shape == (1024, 16)
    assert not torch.equal(mixed, epoch[:1024])


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in TYPES for name in contestants(kind)])
def test_every_contestant_takes_its_steps(kind: str, name: str) -> None:
    taken = []

    def turn(took: float | None = None) -> None:
        if len(taken) == 2:
            raise EnoughError
        taken.append(name)

    with pytest.raises(EnoughError):
        contestants(kind)[name](rows(ARGS), ARGS, turn)
