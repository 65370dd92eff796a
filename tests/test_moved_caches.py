"""A run and a sweep find their cache after either was moved, and never take another one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_kit import invoke, refused
from conftest import write_cache
from safetensors.torch import load_file
from test_train_resume import interrupted
from test_train_sweep import Stopping

from sae_granary import open_cache, resume_sweep, resume_training, train_sae, train_sweep
from sae_granary.common.errors import ConfigError
from sae_granary.common.signed import CHECKSUM, write_signed
from sae_granary.train.cli import app
from sae_granary.train.errors import CheckpointError, InterruptedRunError

SETTINGS = {"type": "topk", "k": 4, "d_sae": 32, "batch_size": 64, "steps": 8, "log_every": 1, "eval_rows": 100}
SETTINGS |= {"device": "cpu"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A cache, another one, and a run that was stopped at step 4, with the weights that it comes to."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("toy", "other")):
        write_cache(folder / "cache" / name, n_docs=20, seed=seed)
    settings = {**SETTINGS, "cache": str(folder / "cache/toy"), "runs_dir": str(folder / "runs")}
    stopped = interrupted(4, **settings, name="a")
    assert stopped == folder / "runs/a"
    shutil.copytree(folder, folder.with_name("whole"))
    resume_training(folder.with_name("whole") / "runs/a")
    weights = load_file(folder.with_name("whole") / "runs/a/sae_weights.safetensors")
    shutil.rmtree(folder.with_name("whole"))
    return folder, weights


@pytest.fixture
def here(project, tmp_path, monkeypatch):
    """A copy in which the stored path leads nowhere: the run's files are as if they had been written in there."""
    monkeypatch.chdir(tmp_path)
    made, _ = project
    away = made.with_name("away")
    made.rename(away)
    shutil.copytree(away, tmp_path / "moved")
    yield tmp_path / "moved"
    away.rename(made)


def assert_finished(folder: Path, weights) -> None:
    got = load_file(folder / "sae_weights.safetensors")
    assert all(torch.equal(got[name], weights[name]) for name in weights)


def test_a_run_that_moved_with_its_cache_goes_on(here, project) -> None:
    result = resume_training(here / "runs/a")
    assert_finished(result.folder, project[1])
    assert result.summary["cache"].endswith("moved/cache/toy")


def test_a_run_whose_cache_moved_alone_names_the_stored_path_and_takes_another(here, project) -> None:
    (here / "cache/toy").rename(here / "elsewhere")
    stored = project[0] / "cache/toy"
    result = invoke(app, "resume", "moved/runs/a", "-q", code=2)
    assert result.stderr == (
        f"error: the cache of moved/runs/a is not at {stored} any more: if it was moved, name it: "
        "sae-train resume moved/runs/a --cache FOLDER\n"
    )
    before = sorted(path.name for path in (here / "runs/a").rglob("*"))
    result = refused(app, "resume", "moved/runs/a", "-q", "--cache", "moved/cache/other")
    assert "--cache moved/cache/other is another cache than the one that moved/runs/a was started on" in result
    assert sorted(path.name for path in (here / "runs/a").rglob("*")) == before
    invoke(app, "resume", "moved/runs/a", "-q", "--cache", "moved/elsewhere")
    assert_finished(here / "runs/a", project[1])


def test_another_cache_at_the_stored_place_is_not_taken(here, project) -> None:
    shutil.copytree(here / "cache/other", project[0] / "cache/toy")
    try:
        assert_finished(resume_training(here / "runs/a").folder, project[1])  # the one beside the run
    finally:
        shutil.rmtree(project[0])


def test_the_same_command_with_the_new_place_of_its_cache_continues(here, project) -> None:
    (here / "cache/toy").rename(here / "elsewhere")
    settings = {**SETTINGS, "runs_dir": "moved/runs", "name": "a", "resume": "auto"}
    with pytest.raises(ConfigError, match=r"the cache of moved/runs/a is not at .*cache/toy any more"):
        train_sae(**settings, cache="moved/cache/other")
    result = train_sae(**settings, cache="moved/elsewhere")
    assert_finished(result.folder, project[1])
    assert train_sae(**settings, cache="moved/elsewhere").summary["steps"] == 8  # complete: its result


def test_a_run_of_before_without_recorded_paths_continues_by_the_flag(here, project) -> None:
    record = json.loads((here / "runs/a/run.json").read_text())
    record.pop("cache_paths")
    write_signed(here / "runs/a/run.json", {k: v for k, v in record.items() if k != CHECKSUM})
    with pytest.raises(ConfigError, match=r"is not at .*cache/toy any more"):
        resume_training(here / "runs/a")
    assert_finished(resume_training(here / "runs/a", cache=here / "cache/toy").folder, project[1])


def test_no_run_of_a_sweep_trains_on_a_cache_that_took_the_place_of_its_own(project, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "other"):
        shutil.copytree(project[0] / "cache" / name, tmp_path / name)
    settings, reporter = {key: value for key, value in SETTINGS.items() if key != "batch_size"}, Stopping(4)
    with pytest.raises(InterruptedRunError):  # while the run of the second batch size has not begun
        train_sweep({"batch_size": [64, 32]}, settings, cache="toy", runs_dir="runs", name="s", reporter=reporter,
                    stop=reporter.sink.stop)  # fmt: skip
    Path("toy").rename("kept")
    Path("other").rename("toy")
    with pytest.raises(CheckpointError, match=r"runs/s belongs to another cache .*: cache.seed: .*; name its own"):
        resume_sweep("runs/s")
    assert [path.parent.name[-2:] for path in Path("runs/s").glob("*/run.json")] == ["64"]
    assert resume_sweep("runs/s", cache="kept").failures == {}


@pytest.mark.parametrize("n_docs", [7, 14])  # fewer shards, and as many of which the last is smaller
def test_a_cache_with_fewer_rows_says_so(project, tmp_path, monkeypatch, n_docs) -> None:
    monkeypatch.chdir(tmp_path)
    for name, size in ("whole", 16), ("part", n_docs):  # the same harvest, ended earlier
        write_cache(tmp_path / name, n_docs=size, rows_per_shard=400)
    folder = interrupted(4, **SETTINGS, cache="whole", runs_dir="runs", name="a")
    result = refused(app, "resume", folder, "-q", "--cache", "part")
    part, whole = open_cache("part"), open_cache("whole")
    assert len(part.shards) == {7: 1, 14: 2}[n_docs]
    assert f"part holds {part.n_rows:,} rows in {len(part.shards)} shards, not the {whole.n_rows:,} in " in result
    assert "that the run was started on: name the whole cache with --cache, or train a new run" in result


@pytest.mark.parametrize("old", [False, True])
def test_a_sweep_finds_its_cache_and_refuses_another(project, tmp_path, monkeypatch, old) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "other"):
        shutil.copytree(project[0] / "cache" / name, tmp_path / "p/cache" / name)
    settings = {key: value for key, value in SETTINGS.items() if key != "k"}
    reporter = Stopping(4)
    grid = {"k": [2, 4]}
    with pytest.raises(InterruptedRunError):
        train_sweep(grid, settings, cache="p/cache/toy", runs_dir="p/runs", name="s", reporter=reporter,
                    stop=reporter.sink.stop)  # fmt: skip
    if old:
        plan = json.loads(Path("p/runs/s/sweep.json").read_text())
        plan["groups"] = [{k: v for k, v in g.items() if k not in ("cache", "cache_paths")} for g in plan["groups"]]
        write_signed(Path("p/runs/s/sweep.json"), {k: v for k, v in plan.items() if k != CHECKSUM})
    Path("p").rename("q")
    Path("q/cache/toy").rename("q/elsewhere")
    with pytest.raises(ConfigError, match=r"the cache of .* is not at .*p/cache/toy any more: .* --cache FOLDER"):
        resume_sweep("q/runs/s")
    with pytest.raises(CheckpointError, match=r"--cache q/cache/other is another cache than the one that"):
        resume_sweep("q/runs/s", cache="q/cache/other")
    if not old:
        Path("q/elsewhere").rename("q/cache/toy")
        assert resume_sweep("q/runs/s").failures == {}
        return
    assert resume_sweep("q/runs/s", cache="q/elsewhere").failures == {}
