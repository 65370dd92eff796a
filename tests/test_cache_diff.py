"""sae-cache diff: fields and rows of two caches."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from cache_kit import run_cache

from sae_granary import CacheWriter

run = partial(run_cache, "diff")
X = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)


def write(path, x, **options):
    with CacheWriter(path, d_in=4, rows_per_shard=32, origin={"source": "test"}, **options) as writer:
        writer.add(x)
    return path


def test_equal_caches_are_the_same_and_others_are_told_apart(tmp_path):
    a = write(tmp_path / "a", X)
    b = Path(shutil.copytree(a, tmp_path / "b"))
    assert "the same: 100 rows" in run(a, b).stdout
    changed = X.copy()
    changed[40, 1] += 0.5
    changed[70] *= 2
    c = write(tmp_path / "c", changed, model="other")
    shown = run(a, c, code=1).stdout
    assert "model: None and 'other'" in shown
    assert "vectors: 2 rows differ, the first is 40" in shown
    body = json.loads(run(a, c, "--json", code=1).stdout)
    gap = np.linalg.norm(X - changed) / np.linalg.norm(X)
    np.testing.assert_allclose(body["hooks"]["vectors"]["relative"], gap, rtol=1e-6)
    np.testing.assert_allclose(body["hooks"]["vectors"]["largest"], np.abs(X - changed).max(), rtol=1e-6)
    d = write(tmp_path / "d", X[:60])
    shown = run(a, d, code=1).stdout
    assert "rows: 100 and 60; the first 60 are compared" in shown
    assert "the 60 rows that both have are equal" in shown
    assert "is not an activation cache" in run(a, tmp_path, code=2).stderr
