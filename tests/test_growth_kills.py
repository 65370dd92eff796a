# ruff: noqa: F811
"""Killed at any instant and run again, an extension, an addition and a repair end with the same bytes."""

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harvest_kit import CutOff
from kill_kit import damage
from test_harvest_extend import config, harvest, models  # noqa: F401
from test_train_grown import SETTINGS
from test_train_resume import interrupted

from sae_granary import train_sae
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.models.config import WhereConfig

TESTS = Path(__file__).parent
LAYER_2 = WhereConfig(layers=(2,))


@pytest.fixture
def growths(config: HarvestConfig, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with what the kit needs: a cache before an extension, an addition and a repair."""
    config = replace(config, dtype=getattr(request, "param", "auto"))
    harvest(config, max_tokens=300)
    for what in ("extend", "add"):
        shutil.copytree(config.out_path, tmp_path / what / "before")
    add_hooks(config.out_path, LAYER_2, quiet=True)
    damage(config.out_path)
    shutil.copytree(config.out_path, tmp_path / "repair" / "before")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    return tmp_path


@pytest.fixture
def unjoined(config: HarvestConfig, tmp_path: Path) -> Path:
    """The same of a harvest in blocks and its extension, whose blocks are complete and not joined."""
    config = replace(config, block_docs=6, max_tokens=220)

    def stop(*_: object) -> None:
        raise CutOff

    for what, n_rows in (("join", None), ("extend", 100)):
        if n_rows is not None:
            shutil.rmtree(config.out_path)
            harvest(config, max_tokens=n_rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sae_granary.harvest.ranks.work.join", stop)
            with pytest.raises(CutOff):
                harvest(config, extend=n_rows is not None)
        shutil.copytree(config.out_path, tmp_path / what / "before")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    return tmp_path


def killed(root: Path, whats: str, every: int | str, n_random: int) -> None:
    run_kit("kill_kit.py", root, whats, every, n_random)


def run_kit(name: str, *args: object) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OPENBLAS_NUM_THREADS": "1"}
    line = [sys.executable, str(TESTS / name), *map(str, args)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_killed_repair_ends_with_the_same_bytes(growths: Path) -> None:
    killed(growths, "repair", 0, 0)


@pytest.mark.slow
def test_a_killed_extension_and_addition_end_with_the_same_bytes(growths: Path) -> None:
    killed(growths, "extend,add", 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "every", "n_random"), [("join", 20, 5), ("extend", 30, 0)])
def test_a_killed_join_of_blocks_ends_with_the_same_bytes(unjoined: Path, what: str, every: int, n_random: int) -> None:
    killed(unjoined, what, every, n_random)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["extend", "add", "repair"])
def test_killed_at_every_rename(growths: Path, config: HarvestConfig, what: str) -> None:
    with_runs(growths, config)
    killed(growths, what, 10, 0)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["extend", "add", "repair"])
def test_killed_at_20_random_instants(growths: Path, config: HarvestConfig, what: str) -> None:
    with_runs(growths, config)
    killed(growths, what, "none", 20)


@pytest.mark.slow
@pytest.mark.parametrize("growths", ["int8"], indirect=True)
def test_int8_killed_at_10_random_instants(growths: Path) -> None:
    killed(growths, "extend,add,repair", "none", 10)


@pytest.mark.slow
def test_a_second_process_is_refused_and_does_no_damage_without_locks(growths: Path) -> None:
    run_kit("at_once_kit.py", growths, "extend", "add", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("extend", "extend"), ("add", "add"), ("extend", "add"), ("add", "extend")]
)
def test_no_interleaving_of_two_processes_without_locks_does_damage(growths: Path, first: str, second: str) -> None:
    run_kit("at_once_kit.py", growths, first, second, 19)


def with_runs(root: Path, config: HarvestConfig) -> None:
    """A run on the cache before, one of them stopped; they are resumed on what the kills leave."""
    shutil.rmtree(config.out_path)
    shutil.copytree(root / "extend/before", config.out_path)
    settings = {**SETTINGS, "cache": str(config.out_path), "runs_dir": str(root / "runs")}
    train_sae(**settings, name="whole")
    interrupted(10, **settings, name="stopped")
