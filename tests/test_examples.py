"""The scripts of examples/ run as they stand."""

import runpy
from pathlib import Path

import pytest

from sae_granary.sae_core import registry

SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
SAYS = {
    "train_from_python": "FVU ",
    "custom_loop": "{'fvu': ",
    "own_metric": "\n50 ",
    "own_variant": "soft_topk: FVU ",
}


def test_every_script_is_known() -> None:
    assert {path.stem for path in SCRIPTS} == set(SAYS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(make_cache, tmp_path, monkeypatch, capsys, path) -> None:
    monkeypatch.chdir(tmp_path)
    registry.discover()
    monkeypatch.setattr(registry, "_VARIANTS", dict(registry._VARIANTS))  # what a script registers is its own
    monkeypatch.setattr("sys.argv", [str(path), str(make_cache(n_docs=80))])
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.stem] in capsys.readouterr().out
