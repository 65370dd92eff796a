"""Two processes that start, continue or replace one run or sweep: one comes just before the other takes the lock."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_train_resume import interrupted

from sae_granary import resume_training, train_sae, train_sweep
from sae_granary.common.errors import ConfigError
from sae_granary.common.finished_run import NotARunError, read_summary
from sae_granary.train import run
from sae_granary.train.errors import RunExistsError
from sae_granary.train.folders import exclusive
from sae_granary.train.sweeps import execution

SETTINGS: dict[str, Any] = {"type": "topk", "k": 4, "d_sae": 32, "batch_size": 64, "steps": 3, "log_every": 1}


@pytest.fixture
def settings(make_cache: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    return {**SETTINGS, "cache": str(make_cache()), "runs_dir": str(tmp_path), "name": "run"}


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Have another process do all of its work when this one is about to take the lock of its folder."""

    def before(other: Callable[[], object]) -> None:
        waiting = [other]

        def lock(folder: Path) -> Any:
            if waiting:
                waiting.pop()()
            return exclusive(folder)

        for module in (run, execution):
            monkeypatch.setattr(module, "exclusive", lock)

    return before


def test_of_two_runs_of_one_name_the_second_never_continues_the_other(settings: Any, first: Any) -> None:
    first(lambda: train_sae(**settings, lr=1e-4))
    with pytest.raises(RunExistsError, match=r"begun meanwhile by another process with other settings \(lr=0.0001, "):
        train_sae(**settings)


def test_a_run_that_is_replaced_before_it_resumes_is_not_continued(settings: Any, first: Any) -> None:
    stopped = interrupted(2, **settings)
    first(lambda: train_sae(**settings, lr=1e-4, overwrite=True))
    with pytest.raises(RunExistsError, match="begun meanwhile by another process with other settings"):
        resume_training(stopped)
    assert read_summary(stopped)["steps"] == 3


def test_a_folder_that_is_removed_before_it_is_locked_is_named(settings: Any, first: Any, tmp_path: Path) -> None:
    first(lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(NotARunError, match=r"run was removed by another process: run the same command again"):
        train_sae(**settings)


def test_a_sweep_and_a_run_never_share_a_folder(settings: Any, first: Any, tmp_path: Path) -> None:
    grid, common = {"k": [2, 4]}, {name: value for name, value in settings.items() if name != "k"}
    for other in (lambda: train_sae(**settings), lambda: train_sweep(grid, common | {"lr": 1e-4})):
        first(other)
        with pytest.raises(RunExistsError, match="run was begun or replaced meanwhile by another process"):
            train_sweep(grid, common)
        shutil.rmtree(tmp_path / "run")
    first(lambda: train_sweep(grid, common))
    with pytest.raises(ConfigError, match="is a sweep of several runs"):
        train_sae(**settings)
