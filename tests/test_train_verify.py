"""`--verify` checks what a run is about to read, and nothing else, before anything is written."""

from pathlib import Path

import pytest
from cache_kit import flip
from command_kit import invoke
from conftest import write_cache

from sae_granary import open_cache
from sae_granary.train.cli import app

FLAGS = ["--cache", "toy", "--hook", "layer_1", "--type", "topk", "--steps", "2", "--batch-size", "64", "--d-sae", "16",
         "--k", "2", "--device", "cpu", "--quiet", "--verify"]  # fmt: skip
COMMANDS = {"run": [], "sweep": ["--grid", "init_seed=0,1"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_one_flipped_byte_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "toy", n_docs=20, d_in=8, hooks=("layer_1", "layer_2"))
    arguments = [command, *FLAGS, *COMMANDS[command]]
    shard = open_cache("toy").shard_path("layer_1", 0)
    flip(open_cache("toy").shard_path("layer_2", 0))  # not read
    for file in (shard, tmp_path / "toy/norms/layer_1/c.0", tmp_path / "toy/rows/token_id/c.0"):
        flip(file)
        result = invoke(app, *arguments, code=2)
        assert file.name in result.output
        assert "is damaged: its checksum is" in result.output
        assert "sae-harvest repair" in result.output
        assert not (tmp_path / "runs").exists()
        flip(file)
    invoke(app, *arguments)
