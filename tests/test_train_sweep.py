"""Sweeps: one stream, ordinary runs, bitwise what training alone gives; kills, failures, refusals."""

import csv
import io
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from fork_kit import LIMIT
from rich.console import Console
from test_train_resume import StopAt, assert_same, log, start

from sae_granary import resume_sweep, resume_training, sae_core, train_sae, train_sweep
from sae_granary.cache.load.loader import Loader
from sae_granary.common.errors import ConfigError
from sae_granary.common.finished_run import NotARunError, read_metrics
from sae_granary.common.signals import StopRequest
from sae_granary.train import lockstep
from sae_granary.train.callbacks import Callback
from sae_granary.train.data.streams import RunStream
from sae_granary.train.errors import InterruptedRunError, RunExistsError
from sae_granary.train.folders import exclusive
from sae_granary.train.memory.footprint import Footprint, fit_groups
from sae_granary.train.sinks.sink import TIMING
from sae_granary.train.state import checkpoint
from sae_granary.train.sweeps import execution, grouping
from sae_granary.train.sweeps.grid import check_grid, expand, parse_grid
from sae_granary.train.sweeps.reporter import Reporter
from sae_granary.train.sweeps.sweep import plan_sweep
from sae_granary.train.sweeps.sweep_console import SweepConsole
from sae_granary.train.sweeps.sweep_plan import load_plan
from sae_granary.train.trainer import Trainer

SETTINGS = {"d_sae": 32, "batch_size": 128, "steps": 20, "save_every": 6, "log_every": 4, "eval_rows": 300}


def table(folder: Path) -> list[dict]:
    with open(folder / "results.csv", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def assert_same_as_alone(sweep: Path, settings: dict, runs_dir: Path) -> None:
    for entry in load_plan(sweep).entries:
        config = entry.config
        own = {"type": config.type, "hook": list(config.hook), "init_seed": config.init_seed, "steps": config.steps}
        own |= {"k": config.options["k"]} if "k" in config.options else {}
        folder = train_sae(**{**settings, **own}, name=entry.name, runs_dir=str(runs_dir)).folder
        assert_same(folder, sweep / entry.name)


def assert_same_sweep(whole: Path, other: Path) -> None:
    assert table(whole) == table(other)
    assert len(table(whole)) == len(load_plan(whole).entries)
    for entry in load_plan(whole).entries:
        assert_same(whole / entry.name, other / entry.name)


def test_members_equal_runs_alone_bitwise(make_cache, tmp_path) -> None:
    """Types of three kinds of input, two hook points, pools smaller than the cache."""
    cache = str(make_cache(hooks=("layer_3", "layer_4"), d_in=8))
    settings = {**SETTINGS, "cache": cache, "shuffle_seed": 5, "pool_rows": 900, "steps": 8}
    grid = {"type": ["topk", "vanilla", "temporal", "route"], "hook": ["layer_3", "layer_4"], "k": [3]}
    result = train_sweep(grid, settings, runs_dir=str(tmp_path), name="all")
    assert not result.failures
    plan = load_plan(result.folder)
    assert [len(group.entries) for group in plan.groups] == [5, 2]  # neighbors have an order of their own
    assert "vanilla has no k: left out there" in plan.notes
    assert "1 of 8 points equal others: 7 SAEs are trained" in plan.notes
    assert_same_as_alone(result.folder, settings, tmp_path / "alone")


def test_members_of_other_lengths_equal_runs_alone(make_cache, tmp_path, monkeypatch) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "k": 3, "save_every": 4}
    settings.pop("steps")
    result = train_sweep({"steps": [12, 7], "seed": [0, 1]}, settings, runs_dir=str(tmp_path))
    assert [len(group.entries) for group in load_plan(result.folder).groups] == [4]
    assert_same_as_alone(result.folder, settings, tmp_path / "alone")
    short, long = (next(row["name"] for row in result.rows if row["steps"] == steps) for steps in (7, 12))
    shutil.rmtree(result.folder / short)  # starts over and ends before the step of the other: another stream follows
    (result.folder / long / "summary.json").unlink()
    shutil.rmtree(checkpoint.list_checkpoints(result.folder / long)[-1])
    streams = []
    monkeypatch.setattr(lockstep, "RunStream", lambda *args: streams.append(args[2]) or RunStream(*args))
    resume_sweep(result.folder)
    assert streams == [0, 8]
    for name in (short, long):
        assert_same(tmp_path / "alone" / name, result.folder / name)


def test_a_cache_is_read_once_for_all_members(make_cache, tmp_path, monkeypatch) -> None:
    taken = []
    original = Loader.__next__
    monkeypatch.setattr(Loader, "__next__", lambda self: taken.append(self.hooks) or original(self))
    cache = str(make_cache(hooks=("layer_3", "layer_4"), d_in=8))
    train_sweep(
        {"k": [2, 3], "hook": ["layer_3", "layer_4"]}, SETTINGS, type="topk", cache=cache, runs_dir=str(tmp_path)
    )
    assert taken.count(("layer_3", "layer_4")) == SETTINGS["steps"]


class Stopping(Reporter):
    """Ask for a stop when some SAE has taken a step."""

    def __init__(self, step: int) -> None:
        self.sink = StopAt(step)

    def sinks(self, entry):
        return [self.sink]


@pytest.fixture
def grid_of_six(make_cache):
    grid = {"type": ["topk", "vanilla"], "k": [2, 3], "seed": [0, 1]}
    return grid, {**SETTINGS, "cache": str(make_cache())}


def test_a_signal_saves_all_and_the_same_call_continues(grid_of_six, tmp_path) -> None:
    grid, settings = grid_of_six
    whole = train_sweep(grid, settings, runs_dir=str(tmp_path / "a"))
    reporter = Stopping(8)
    with pytest.raises(InterruptedRunError, match=r"after step 8; continue with: sae-train resume .*b/toy_sweep_"):
        train_sweep(grid, settings, runs_dir=str(tmp_path / "b"), reporter=reporter, stop=reporter.sink.stop)
    stopped = tmp_path / "b" / whole.folder.name
    for entry in load_plan(stopped).entries:
        newest = checkpoint.list_checkpoints(stopped / entry.name)[-1]
        assert newest.name == "step_00000008"
    assert not (stopped / "results.csv").exists()
    again = train_sweep(grid, settings, runs_dir=str(tmp_path / "b"))
    assert_same_sweep(whole.folder, again.folder)
    assert {p.name for p in again.folder.iterdir()} >= {"results.csv", "results.md", "results.json", "pareto.png"}


def test_members_continue_from_different_steps_and_alone(grid_of_six, tmp_path, monkeypatch) -> None:
    grid, settings = grid_of_six
    whole = train_sweep(grid, settings, runs_dir=str(tmp_path / "a"))
    reporter = Stopping(16)
    with pytest.raises(InterruptedRunError):
        train_sweep(grid, settings, runs_dir=str(tmp_path / "b"), reporter=reporter, stop=reporter.sink.stop)
    stopped = tmp_path / "b" / whole.folder.name
    names = [entry.name for entry in load_plan(stopped).entries]
    shutil.rmtree(stopped / names[0] / "checkpoints" / "step_00000016")  # from step 12
    shutil.rmtree(stopped / names[1] / "checkpoints")  # from the start
    shutil.rmtree(stopped / names[2])  # never begun
    resume_training(stopped / names[3])  # a member is an ordinary run
    monkeypatch.setattr(grouping, "available_memory", lambda device: pytest.fail("the plan is measured again"))
    resume_sweep(stopped)
    assert_same_sweep(whole.folder, stopped)
    assert sae_core.load(stopped / names[2]).type_name == "topk"


class Steps(Callback):
    def __init__(self, k: int, stop: StopRequest) -> None:
        self.k, self.stop, self.n = k, stop, 0

    def on_step(self, event):
        self.n += 1
        if self.n == 5 and self.k == 3:
            self.stop.signum = signal.SIGTERM
        return {"mine": 100 * self.k + self.n}

    def state(self):
        return {"n": self.n}

    def restore(self, state) -> None:
        self.n = state["n"]


def test_each_member_has_callbacks_of_its_own(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "runs_dir": str(tmp_path), "name": "s"}
    stop = StopRequest()

    def make(config):
        return [Steps(config.options["k"], stop)]

    with pytest.raises(ConfigError, match=r"callbacks of a sweep are list, expected a function .*=lambda config: "):
        train_sweep({"k": [2, 3]}, settings, callbacks=[print])
    with pytest.raises(InterruptedRunError):
        train_sweep({"k": [2, 3]}, settings, callbacks=make, stop=stop)
    refused = resume_sweep(tmp_path / "s").failures  # their state would be lost
    assert ["written with 1 callbacks, now there are 0" in text for text in refused.values()] == [True, True]
    result = train_sweep({"k": [2, 3]}, settings, callbacks=lambda c: [Steps(c.options["k"], StopRequest())])
    for row in result.rows:
        seen = [line["mine"] for line in log(result.folder / row["name"])]
        assert seen == [100 * row["k"] + step for step in range(1, len(seen) + 1)]
        assert len(seen) == row["steps"] > 5


def test_a_member_that_diverges_does_not_stop_the_others(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "k": 3, "grad_clip": "none"}
    calls = []

    class Count(Reporter):
        def sinks(self, entry):
            calls.append(entry.name)
            return ()

    result = train_sweep({"lr": ["1e-3", "1e30"]}, settings, runs_dir=str(tmp_path), name="s")
    good, bad = (row["name"] for row in result.rows)
    assert list(result.failures) == [bad]
    assert "lower" in result.failures[bad]
    alone = train_sae(**{**settings, "lr": 1e-3}, runs_dir=str(tmp_path / "c"))
    assert_same(alone.folder, result.folder / good)
    assert [row["status"] for row in table(result.folder)] == ["finished", "failed"]
    again = train_sweep({"lr": ["1e-3", "1e30"]}, settings, runs_dir=str(tmp_path), name="s", reporter=Count())
    assert calls == []  # it would diverge again
    assert again.failures == result.failures
    assert "1e30" in bad


@pytest.mark.parametrize("where", ["open", "begin"])
def test_another_failure_does_not_stop_the_others_and_is_tried_again(make_cache, tmp_path, monkeypatch, where) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "runs_dir": str(tmp_path)}

    def broken(what, *args):
        data = what.data if where == "begin" else what
        if data.config.options["k"] == 3:
            raise OSError("no such device")
        return original(what, *args)

    with monkeypatch.context() as patch:
        target, name = (Trainer, "begin") if where == "begin" else (execution, "open_trainer")
        original = getattr(target, name)
        patch.setattr(target, name, broken)
        result = train_sweep({"k": [2, 3]}, settings)
    assert list(result.failures.values()) == ["no such device"]
    again = resume_sweep(result.folder)
    assert not again.failures
    assert not list(result.folder.rglob("failure.json"))


def test_groups_that_fit_the_memory(make_cache, tmp_path, monkeypatch) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk"}
    whole = train_sweep({"k": [1, 2, 3, 4]}, settings, runs_dir=str(tmp_path / "a"))
    monkeypatch.setattr(grouping, "available_memory", lambda device: int(1000 / grouping.MARGIN) + 1)
    monkeypatch.setattr(grouping, "measure", lambda data: Footprint(300, 300))
    monkeypatch.setattr(grouping, "estimate", lambda config: Footprint(200, 200))
    parts = train_sweep({"k": [1, 2, 3, 4]}, settings, runs_dir=str(tmp_path / "b"))
    assert [len(group.entries) for group in load_plan(parts.folder).groups] == [2, 2]
    assert "2 fit at once, 2 groups train one after another" in load_plan(parts.folder).notes[-1]
    assert table(whole.folder) == table(parts.folder)
    monkeypatch.setattr(grouping, "measure", lambda data: Footprint(data.config.options["k"] * 300, 300))
    with pytest.raises(ConfigError, match=r"2 of these 4 SAEs would fit: .*_k3_s0 needs .* of memory, cpu has"):
        plan_sweep({"k": [1, 2, 3, 4]}, settings)


def test_first_fit() -> None:
    sizes = [("a", Footprint(4, 1)), ("b", Footprint(3, 3)), ("c", Footprint(2, 1)), ("d", Footprint(9, 9))]
    assert fit_groups(sizes, 10) == [["a", "b"], ["c"], ["d"]]
    assert fit_groups(sizes, 100) == [["a", "b", "c", "d"]]


def test_a_measured_footprint_holds_the_weights(make_cache) -> None:
    from sae_granary.train.config.merge import make_config
    from sae_granary.train.data.run_data import RunData
    from sae_granary.train.memory.footprint import estimate, measure

    settings = {"cache": str(make_cache()), "type": "vanilla", "d_sae": 20_000, "batch_size": 256, "device": "cpu"}
    data = RunData.open(make_config([settings]))
    measured = measure(data)
    assert measured is not None
    assert measured.resident >= estimate(data.config).resident
    assert measured.step >= 256 * 20_000 * 4  # at least the pre-activations


def test_grids_as_text() -> None:
    assert parse_grid(["k=16,32", "init-seed=0"]) == {"k": ["16", "32"], "init_seed": ["0"]}
    assert parse_grid(["fractions=[0.1,1],[0.5, 1]"]) == {"fractions": ["[0.1,1]", "[0.5, 1]"]}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["k"], r"--grid 'k': expected key=value,value"),
        (["k=1", "k=2"], r"--grid k is given twice: name all its values once, k=a,b,c"),
        (["k=1,2,1"], r"the grid repeats itself: k holds 1 twice; remove one"),
        (["k=1,,2"], r"the grid's k has an empty value"),
        (["seed=0", "init_seed=1"], r"the grid holds init_seed twice"),
        (["cache=a,b"], r"the grid holds cache, which is one for a whole sweep: give --cache"),
        ([], r"the grid is empty"),
        (["kk=1,2"], r"unknown setting 'kk' for type topk, did you mean 'k'\?"),
        (["type=topk,vanilla", "auxk_coeff=1,2"], r"'auxk_coeff' for any of topk, vanilla, did you mean 'auxk_coef'\?"),
        (["type=topq"], r"unknown type 'topq' .*, did you mean 'topk'\?"),
        (["k=2,0"], r"k=0: expected a value > 0"),
        (["d_sae=32,64"], r"d_sae is set both in the grid and for all SAEs"),
        (["steps=1,2", "epochs=1"], r"a run has one length"),
    ],
)
def test_bad_grids_are_refused_before_anything_is_written(make_cache, tmp_path, texts, message) -> None:
    settings = {"cache": str(make_cache()), "d_sae": 32, "batch_size": 128, "runs_dir": str(tmp_path / "runs")}
    settings |= {} if any(text.startswith("type=") for text in texts) else {"type": "topk"}
    with pytest.raises((ConfigError, sae_core.SAEError), match=message):
        train_sweep(parse_grid(texts), settings)
    assert not (tmp_path / "runs").exists()


def test_points_and_what_types_lack() -> None:
    points = expand(check_grid({"type": ["topk", "vanilla"], "k": [1, 2], "seed": [0, 1]}), {"lr": 1})
    assert len(points) == 8
    assert points[0].settings == {"lr": 1, "type": "topk", "k": 1, "init_seed": 0}
    assert points[4].settings == points[6].settings == {"lr": 1, "type": "vanilla", "init_seed": 0}
    assert points[4].dropped == ("k",)


def test_names_tell_what_varies_and_stay_the_same(make_cache) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "k": 3}
    plan = plan_sweep({"lr": ["1e-3", "2e-3"], "seed": [0, 1]}, settings)
    assert [e.name for e in plan.entries] == [
        "toy_layer_3_topk_d32_k3_s0_lr1e-3",
        "toy_layer_3_topk_d32_k3_s1-o0_lr1e-3",
        "toy_layer_3_topk_d32_k3_s0_lr2e-3",
        "toy_layer_3_topk_d32_k3_s1-o0_lr2e-3",
    ]
    assert plan_sweep({"lr": ["1e-3", "2e-3"], "seed": [0, 1]}, settings).name == plan.name
    assert plan_sweep({"lr": ["1e-3", "3e-3"], "seed": [0, 1]}, settings).name != plan.name


def test_other_seeds_of_the_order_are_another_stream(make_cache) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "k": 3}
    plan = plan_sweep({"shuffle_seed": [0, 1], "holdout": [0.05, 0.1], "seed": [0, 1]}, settings)
    assert [len(group.entries) for group in plan.groups] == [2, 2, 2, 2]


def test_another_sweep_under_the_same_name_is_refused(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "runs_dir": str(tmp_path), "name": "s"}
    train_sweep({"k": [2]}, settings)
    with pytest.raises(RunExistsError, match=r"holds a sweep with other settings: choose another --name"):
        train_sweep({"k": [3]}, settings)
    assert [row["k"] for row in train_sweep({"k": [3]}, settings, overwrite=True).rows] == [3]
    with pytest.raises(RunExistsError, match="exists and is not a sweep"):
        train_sweep({"k": [3]}, {**settings, "runs_dir": str(tmp_path / "s"), "name": "toy_layer_3_topk_d32_k3_s0"})
    with pytest.raises(ConfigError, match="expected one folder name"):
        train_sweep({"k": [3]}, {**settings, "name": "../s"})
    with pytest.raises(NotARunError, match="holds no sweep"):
        resume_sweep(tmp_path)


def test_a_sweep_in_training_is_not_overwritten(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "runs_dir": str(tmp_path), "name": "s"}
    folder = train_sweep({"k": [2]}, settings).folder
    for held in (folder, folder / "toy_layer_3_topk_d32_k2_s0"):
        with exclusive(held), pytest.raises(RunExistsError, match=r"is being trained by process \d+"):
            train_sweep({"k": [3]}, settings, overwrite=True)
    with pytest.raises(ConfigError, match="which --overwrite removes"):
        train_sweep({"k": [3]}, settings, overwrite=True, init_from=str(folder / "toy_layer_3_topk_d32_k2_s0"))
    assert [row["k"] for row in resume_sweep(folder).rows] == [2]


DAMAGE = {
    "no groups": lambda plan: plan.pop("groups"),
    "no plan": lambda plan: plan.update(groups=7),
    "no members": lambda plan: plan["groups"][0].pop("members"),
    "no order": lambda plan: plan["groups"][0].update(order={}),
    "other counts": lambda plan: plan["groups"][0].update(counts={"nope": 3}),
    "no config": lambda plan: plan["groups"][0]["members"][0].update(config=None),
    "a bad setting": lambda plan: plan["groups"][0]["members"][0]["config"]["model"].update(k=-1, nope=3),
    "outside": lambda plan: plan["groups"][0]["members"][0]["config"]["run"].update(name="../outside"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_refused(make_cache, tmp_path, damage) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "steps": 2, "runs_dir": str(tmp_path / "runs")}
    folder = train_sweep({"k": [2]}, settings).folder
    plan = json.loads((folder / "sweep.json").read_text())
    DAMAGE[damage](plan)
    (folder / "sweep.json").write_text(json.dumps(plan, indent=1))
    with pytest.raises(NotARunError, match=r"sweep.json: the checksum in its last line does not fit"):
        resume_sweep(folder)
    plan["version"] = 1  # of before there were checksums
    del plan["xxh3"]
    (folder / "sweep.json").write_text(json.dumps(plan, indent=1))
    with pytest.raises(NotARunError, match=r"sweep.json( is damaged|, groups\[0\]|: groups is)"):
        resume_sweep(folder)
    assert not (tmp_path / "runs" / "outside").exists()


def test_each_member_has_a_wandb_run_of_its_own(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "wandb": "offline", "steps": 8}
    result = train_sweep({"k": [2, 3]}, settings, runs_dir=str(tmp_path))
    for row in result.rows:
        folder = result.folder / row["name"]
        run_id = json.loads((folder / "run.json").read_text())["wandb_id"]
        [file] = (folder / "wandb").glob("offline-run-*/run-*.wandb")
        assert file.name == f"run-{run_id}.wandb"
        deadline = time.monotonic() + LIMIT  # wandb's own process writes a moment later
        while b"metrics/l0" not in file.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.1)


def dying(step: int, seconds: float, **arguments) -> None:
    """Train a sweep; be killed before this step of a member, or by a timer so many processor seconds later."""
    take = Trainer.take

    def die_first(self, *given):
        if self.run.step >= step:
            Trainer.take = take
            if seconds == 0.0:
                os.kill(os.getpid(), signal.SIGKILL)
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal has no handler
        take(self, *given)

    Trainer.take = die_first
    train_sweep(**arguments)


def test_a_killed_sweep_continues(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "steps": 40, "log_every": 1}
    whole = train_sweep({"k": [2, 3]}, settings, runs_dir=str(tmp_path / "a"), name="s").folder
    killed = tmp_path / "b" / "s"
    arguments = {"grid": {"k": [2, 3]}, "settings": settings, "name": "s", "runs_dir": str(tmp_path / "b")}
    process = start(dying, step=9, seconds=0.0, **arguments)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / "results.csv").exists()
    assert 8 <= len(read_metrics(killed / "toy_layer_3_topk_d32_k3_s0")) < 40
    train_sweep(**arguments)
    assert_same_sweep(whole, killed)


@pytest.mark.slow
def test_a_sweep_killed_at_random_instants_ends_with_the_same_table(make_cache, tmp_path) -> None:
    """Killed five times; the same call again continues; the table is that of an uninterrupted sweep."""
    settings = {**SETTINGS, "cache": str(make_cache()), "steps": 160, "save_every": 7, "log_every": 1}
    grid = {"type": ["topk", "batchtopk", "matryoshka"], "k": [2, 3], "seed": [0, 1]}
    call = {"grid": grid, "settings": settings, "name": "s"}
    whole = train_sweep(**call, runs_dir=str(tmp_path / "a")).folder
    rng, folder = random.Random(), tmp_path / "b" / "s"
    for step in sorted(rng.sample(range(150), 5)):
        process = start(dying, step=step, seconds=rng.uniform(1e-3, 0.1), **call, runs_dir=str(folder.parent))
        process.join()
        assert process.exitcode == -signal.SIGPROF
        assert not (folder / "results.csv").exists()
    train_sweep(**call, runs_dir=str(folder.parent))
    assert len(table(folder)) == 12
    assert_same_sweep(whole, folder)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_shows_every_member(make_cache, tmp_path, terminal) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "grad_clip": "none", "holdout": 0}
    out = io.StringIO()
    console = SweepConsole(
        Console(file=out, force_terminal=terminal, width=150, height=40, no_color=True, highlight=False)
    )
    train_sweep({"lr": ["1e-3", "1e30"]}, settings, runs_dir=str(tmp_path), name="s", reporter=console)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "s: 2 SAEs from one stream" in text
    assert text.count("no document is held out") == 1
    assert re.search(r"lr1e30\S*: failed: ", text)
    assert ("20/20" in text) == terminal
    assert ("lr1e-3: complete" in text) != terminal


def test_a_misspelt_type_in_a_grid_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no type was given.*; 'tpye' is unknown, did you mean 'type'\?"):
        expand(check_grid({"tpye": ["topk", "batchtopk"]}), {})
