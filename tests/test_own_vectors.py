"""Embeddings from a Parquet file are imported, trained on, encoded and searched; the cache by path, name and URL."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_kit import WIDE, invoke

from sae_granary import train_sae
from sae_granary.analyze.cli import app as analyze
from sae_granary.cache.cli import app as cache_app

N, D = 20_000, 16


def run(app, *args):
    return invoke(app, *args, env=WIDE).stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Embeddings of four topics, imported to cache/vectors, and a run on them."""
    place = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    topic = rng.integers(4, size=N)
    x = (4 * rng.normal(size=(4, D))[topic] + rng.normal(size=(N, D))).astype(np.float32)
    columns = {"id": [f"row-{i}" for i in range(N)], "topic": [f"topic {t}" for t in topic], "embedding": list(x)}
    pq.write_table(pa.table(columns), place / "vectors.parquet", row_group_size=3000)
    more = ("--id-column", "id", "--text-column", "topic", "--rows-per-shard", 6000, "--quiet")
    out = place / "cache" / "vectors"
    assert "20,000 rows" in run(
        cache_app, "import", place / "vectors.parquet", "--column", "embedding", "-o", out, *more
    )
    options = {"type": "topk", "k": 2, "d_sae": 32, "batch_size": 500, "steps": 60, "eval_rows": 500, "device": "cpu"}
    train_sae(cache=str(out), runs_dir=str(place / "runs"), name="a", **options)
    return place


def test_embeddings_are_encoded_and_searched(project):
    assert "20,000 rows" in run(analyze, "encode", project / "runs/a", "--device", "cpu", "--quiet")
    lines = run(analyze, "stats", project / "runs/a", "--device", "cpu", "--quiet")
    densest = lines.split("densest")[1].split()[0]
    assert "topic" in run(analyze, "search", project / "runs/a", "--latent", densest, "--device", "cpu", "--quiet")


@pytest.mark.parametrize("form", ["name", "url"])
def test_a_cache_is_named_or_a_url(project, tmp_path, monkeypatch, form):
    monkeypatch.setenv("GRANARY_CACHE_DIR", str(project / "cache"))
    monkeypatch.setenv("GRANARY_REMOTE_DIR", str(tmp_path / "copies"))
    cache = "vectors" if form == "name" else f"file://{project}/cache/vectors"
    if form == "url":
        pytest.importorskip("fsspec")
    options = (project / "runs/a", "--cache", cache, "--device", "cpu", "--quiet")
    assert "20,000 rows" in run(analyze, "encode", *options, "--out", tmp_path / "codes")
    assert "20,000" in run(analyze, "stats", *options)
    assert json.loads(run(analyze, "eval", *options, "--json"))
    assert bool(list((tmp_path / "copies").glob("*/manifest.json"))) == (form == "url")
