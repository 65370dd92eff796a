"""What hook points cannot be added to: one line, and nothing is written."""

from pathlib import Path

from cache_kit import interrupted, tree
from conftest import write_cache
from typer.testing import CliRunner

from sae_granary.harvest.cli import app


def added(path: Path) -> str:
    before = tree(path)
    result = CliRunner().invoke(app, ["add", "--to", str(path), "--layer", "2"])
    assert result.exit_code == 2
    assert tree(path) == before
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_an_unfinished_cache_gets_no_hook_points(tmp_path: Path) -> None:
    assert "complete" in added(interrupted(tmp_path / "toy"))


def test_a_cache_that_does_not_record_its_harvest(tmp_path: Path) -> None:
    assert "does not record how it was harvested" in added(write_cache(tmp_path / "toy", n_docs=4))
