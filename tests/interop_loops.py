"""The examples that train other libraries' own trainers from our cache. Run by `make interop`."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from sae_granary import CacheWriter, load_sae

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples/peers").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_their_trainers_train_from_our_cache(tmp_path, monkeypatch, capsys, path):
    monkeypatch.chdir(tmp_path)
    with CacheWriter("cache", d_in=16) as writer:
        writer.add(np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32))
    monkeypatch.setattr("sys.argv", [str(path), "cache"])
    runpy.run_path(str(path), run_name="__main__")
    assert "trained on 12,800 rows" in capsys.readouterr().out
    if path.stem == "train_saelens":
        assert load_sae("saelens_sae").config.d_in == 16
