"""What hook points cannot be added to: one line, and nothing is written."""

from pathlib import Path

from cache_kit import interrupted, tree
from command_kit import refused
from conftest import write_cache

from sae_granary.harvest.cli import app


def added(path: Path) -> str:
    before = tree(path)
    line = refused(app, "add", "--to", path, "--layer", 2)
    assert tree(path) == before
    return line


def test_an_unfinished_cache_gets_no_hook_points(tmp_path: Path) -> None:
    assert "complete" in added(interrupted(tmp_path / "toy"))


def test_a_cache_that_does_not_record_its_harvest(tmp_path: Path) -> None:
    assert "does not record how it was harvested" in added(write_cache(tmp_path / "toy", n_docs=4))
