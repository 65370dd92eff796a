"""Interrupted and continued: bitwise the same weights and batches, and only for what the checkpoint belongs to."""

import json
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fork_kit
import pytest
import torch
from conftest import write_cache
from safetensors.torch import load_file

from sae_granary import resume_training, sae_core, train_sae
from sae_granary.cache.load.loader import LoaderState
from sae_granary.common.errors import ConfigError
from sae_granary.common.finished_run import NotARunError, read_metrics
from sae_granary.common.signals import StopRequest
from sae_granary.common.signed import sign
from sae_granary.train.errors import CheckpointError, InterruptedRunError, RunExistsError
from sae_granary.train.folders import exclusive
from sae_granary.train.optim.optimizers import OPTIMIZERS
from sae_granary.train.sinks.sink import TIMING, BaseSink
from sae_granary.train.state import checkpoint
from sae_granary.train.state.rng import Rng

SETTINGS = {"k": 4, "batch_size": 128, "steps": 60, "save_every": 7, "log_every": 1, "eval_rows": 500}


class StopAt(BaseSink):
    """Ask for a stop at a step, as a signal handler would."""

    def __init__(self, step: int) -> None:
        self.step, self.stop = step, StopRequest()

    def metrics(self, metrics) -> None:
        if metrics["step"] == self.step:
            self.stop.signum = signal.SIGTERM


def interrupted(step: int, **settings) -> Path:
    sink = StopAt(step)
    with pytest.raises(InterruptedRunError) as caught:
        train_sae(**settings, sinks=[sink], stop=sink.stop)
    assert (caught.value.step, caught.value.signum) == (step, signal.SIGTERM)
    return caught.value.folder


def log(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]


def assert_same(a: Path, b: Path) -> None:
    assert log(a) == log(b)
    first, second = (load_file(f / "sae_weights.safetensors") for f in (a, b))
    assert all(torch.equal(first[name], second[name]) for name in first)
    native = [checkpoint.list_checkpoints(f)[-1] for f in (a, b)]
    for file in ("sae/sae.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (native[0] / file).read_bytes() == (native[1] / file).read_bytes(), file
    states = [{c.name: checkpoint.read_state(c).body for c in checkpoint.list_checkpoints(f)} for f in (a, b)]
    for name in states[0].keys() & states[1].keys():
        for key in ("score", "tokens", "loader", "rejected", "rejected_in_row"):
            assert states[0][name][key] == states[1][name][key], key
    summaries = [json.loads((f / "summary.json").read_text()) for f in (a, b)]
    for name in ("steps", "tokens", "l0_train", "dead", "eval", "rows"):
        assert summaries[0][name] == summaries[1][name], name


CASES = [("jumprelu", "adam"), *(("batchtopk", optimizer) for optimizer in OPTIMIZERS)]


@pytest.mark.parametrize(("type", "optimizer"), CASES)
def test_a_stopped_run_continues_bitwise(make_cache, tmp_path, type, optimizer) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": type, "optimizer": optimizer, "pool_rows": 1500}
    if type == "jumprelu":
        settings["l0_target"] = settings.pop("k")
    whole = train_sae(**settings, runs_dir=str(tmp_path / "a")).folder
    folder = interrupted(23, **settings, runs_dir=str(tmp_path / "b"))
    assert not (folder / "summary.json").exists()
    again = resume_training(folder)
    assert again.folder == folder
    assert_same(whole, folder)


PARTS = ["weights", "optimizer", "schedule", "tokens", "rng", "dead", "threshold", "loader", "score", "nothing"]


@pytest.fixture(scope="module")
def whole_and_stopped(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    settings = {**SETTINGS, "cache": str(write_cache(folder / "toy")), "type": "batchtopk", "k": 2, "steps": 30}
    settings |= {"dead_after_tokens": 130, "log_every": 3, "save_every": 16, "keep": 9}  # step 16 is not measured
    whole = train_sae(**settings, runs_dir=str(folder / "a")).folder
    return whole, interrupted(15, **settings, runs_dir=str(folder / "b"))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_that_a_resume_restores_matters(whole_and_stopped, tmp_path, monkeypatch, part) -> None:
    """With the restore of one part switched off, the run ends differently; with none, equally."""
    whole, stopped = whole_and_stopped
    restore = checkpoint.load

    def load(*args):
        restored = restore(*args)
        run = restored.run
        if part == "schedule":
            run.step -= 1
        elif part == "tokens":
            run.tokens = 0
        elif part == "rng":
            run.rng = Rng.seeded(123, "cpu")
        elif part == "dead":
            run.sae.num_tokens_since_fired.zero_()
        elif part == "threshold":
            run.sae.threshold.ema.zero_()
        elif part == "score":
            run.score = None
        return replace(restored, loader_state=LoaderState(0)) if part == "loader" else restored

    def fresh_weights(path, shards):
        sae = sae_core.load_native(path, shards)
        sae.reset_weights(torch.Generator().manual_seed(0))
        return sae

    monkeypatch.setattr(checkpoint, "load", load)
    if part == "optimizer":
        monkeypatch.setattr(checkpoint, "load_state_tensors", lambda *a: None)
    if part == "weights":
        fake = SimpleNamespace(
            load_native=fresh_weights, save_native=sae_core.save_native, make_config=sae_core.make_config
        )
        monkeypatch.setattr(checkpoint, "sae_core", fake)
    folder = shutil.copytree(stopped, tmp_path / "run")
    resume_training(folder)
    try:
        assert_same(whole, folder)
    except AssertionError:
        assert part != "nothing"
    else:
        assert part == "nothing"


def start(target, **kwargs):
    process = fork_kit.context().Process(target=target, kwargs=kwargs)
    process.start()
    return process


def timed(told: Path, **settings) -> None:
    """Train; tells how many seconds of the processor that takes."""
    before = time.process_time()
    train_sae(**settings)
    told.write_text(str(time.process_time() - before))


def dying(function, seconds: float, **arguments) -> None:
    """Call a function; after so many seconds of the processor, which others may load, the process is killed."""
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal has no handler; 0 is no timer
    function(**arguments)


@pytest.mark.parametrize("n_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_instants(make_cache, tmp_path, n_kills) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "name": "run"}
    process = start(timed, told=tmp_path / "seconds", **settings, runs_dir=str(tmp_path / "a"))
    process.join()
    duration = float((tmp_path / "seconds").read_text())
    rng = random.Random(n_kills)
    folder = tmp_path / "b" / "run"
    killed = 0
    for i in range(100):
        begun = (folder / "run.json").is_file()
        seconds = rng.uniform(0.0, 0.6 * duration) if killed < n_kills else 0.0
        process = (
            start(dying, function=resume_training, seconds=seconds, folder=folder)
            if begun
            else start(dying, function=train_sae, seconds=seconds, **settings, runs_dir=str(tmp_path / "b"))
        )
        process.join()
        assert process.exitcode in (0, -signal.SIGPROF)
        killed += process.exitcode != 0
        if process.exitcode == 0:
            break
        assert i < 99
    assert killed > 0
    assert_same(tmp_path / "a" / "run", folder)


def test_a_run_killed_before_its_first_checkpoint_starts_over(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk"}
    whole = train_sae(**settings, runs_dir=str(tmp_path / "a")).folder
    folder = interrupted(3, **settings, runs_dir=str(tmp_path / "b"))
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints" / ".tmp-step_00000003").mkdir(parents=True)  # half-written
    resume_training(folder)
    assert_same(whole, folder)


def test_the_best_checkpoint_is_kept_by_fvu(make_cache, tmp_path) -> None:
    # The rate grows until nothing is left of what was learned: the best checkpoint is an early one.
    settings = {**SETTINGS, "lr": 0.5, "warmup_steps": 59, "lr_schedule": "constant", "save_every": 5}
    result = train_sae(cache=str(make_cache()), type="topk", runs_dir=str(tmp_path), keep=1, keep_best=True, **settings)
    kept = {p.name: checkpoint.read_state(p).body["score"] for p in checkpoint.list_checkpoints(result.folder)}
    saved = [(line["fvu"], line["step"]) for line in read_metrics(result.folder) if line["step"] % 5 == 0]
    fvu, step = min(saved)
    assert step < 60
    assert kept == {f"step_{step:08d}": fvu, "step_00000060": saved[-1][0]}
    assert result.summary["best_checkpoint"] == f"step_{step:08d}"


def test_checkpoints_by_the_clock(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "save_every": 0, "steps": 4, "keep": 10, "cache": str(make_cache()), "type": "topk"}
    always = train_sae(**settings, save_minutes=1e-9, runs_dir=str(tmp_path), name="always").folder
    never = train_sae(**settings, save_minutes=0, runs_dir=str(tmp_path), name="never").folder
    n_saved = [len(checkpoint.list_checkpoints(folder)) for folder in (always, never)]
    assert n_saved == [4, 1]
    weights = [(folder / "sae_weights.safetensors").read_bytes() for folder in (always, never)]
    assert weights[0] == weights[1]


def test_resume_auto_continues_bitwise(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "resume": "auto"}
    whole = train_sae(**settings, runs_dir=str(tmp_path / "a")).folder
    stopped = interrupted(23, **settings, runs_dir=str(tmp_path / "b"))
    again = train_sae(**settings, runs_dir=str(tmp_path / "b"))
    assert again.folder == stopped
    assert_same(whole, stopped)
    (stopped / "checkpoints").rename(stopped / "gone")  # a complete run needs none
    assert train_sae(**settings, runs_dir=str(tmp_path / "b")).summary == again.summary


def test_keep_and_names_of_checkpoints(make_cache, tmp_path) -> None:
    def half_removed(event: object) -> None:  # as a process leaves it that is killed while it removes a checkpoint
        (tmp_path / "r" / "checkpoints" / "step_00000001" / "sae").mkdir(parents=True, exist_ok=True)

    settings = {**SETTINGS, "runs_dir": str(tmp_path), "name": "r", "callbacks": [half_removed]}
    result = train_sae(cache=str(make_cache()), type="topk", keep=3, **settings)
    kept = [p.name for p in checkpoint.list_checkpoints(result.folder)]
    assert kept == ["step_00000049", "step_00000056", "step_00000060"]
    assert sorted(p.name for p in (result.folder / "checkpoints").iterdir()) == kept
    files = sorted(str(p.relative_to(result.folder)) for p in (result.folder / "checkpoints").rglob("*") if p.is_file())
    assert not [f for f in files if not f.endswith((".json", ".safetensors"))]


@pytest.fixture
def stopped(make_cache, tmp_path) -> Path:
    return interrupted(23, cache=str(make_cache()), type="topk", runs_dir=str(tmp_path / "runs"), **SETTINGS)


def newest(folder: Path) -> Path:
    return checkpoint.list_checkpoints(folder)[-1]


@pytest.mark.parametrize("file", ["optimizer.safetensors", "sae/sae.safetensors", "rng.safetensors", "sae/sae.json"])
def test_a_flipped_bit_is_found(stopped, file) -> None:
    path = newest(stopped) / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{file} is missing or damaged; remove .*step_00000023 to resume"):
        resume_training(stopped)
    shutil.rmtree(newest(stopped))
    assert resume_training(stopped).summary["steps"] == 60  # from step 21


def test_damaged_state_is_refused(stopped) -> None:
    state = newest(stopped) / "state.json"
    text = state.read_text()
    state.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"state.json cannot be read"):
        resume_training(stopped)
    body = {k: v for k, v in json.loads(text).items() if k != "xxh3"}
    state.write_bytes(sign({**body, "format_version": 4}))
    with pytest.raises(CheckpointError, match=r"checkpoint format 4, this version reads 1 to 3"):
        resume_training(stopped)
    state.write_bytes(sign({**body, "files": {"../../../rng.safetensors": ""}}))
    with pytest.raises(CheckpointError, match=r"outside of the checkpoint"):
        resume_training(stopped)


def test_a_pickle_in_disguise_is_not_unpickled(stopped, tmp_path) -> None:
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "canary",))

    path = newest(stopped) / "optimizer.safetensors"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="damaged"):
        resume_training(stopped)
    assert not (tmp_path / "canary").exists()


def test_another_cache_is_refused(stopped, make_cache, tmp_path) -> None:
    other = make_cache("other", seed=1)
    shutil.rmtree(tmp_path / "toy")
    other.rename(tmp_path / "toy")
    with pytest.raises(CheckpointError, match=r"another cache or order of rows: cache.seed: checkpoint 0, now 1"):
        resume_training(stopped)


def test_what_cannot_be_resumed(stopped, tmp_path) -> None:
    with pytest.raises(NotARunError, match=r"nowhere holds no run: run.json is missing"):
        resume_training(tmp_path / "nowhere")
    resume_training(stopped)
    with pytest.raises(RunExistsError, match=r"is complete; its result is in"):
        resume_training(stopped)


def test_runs_are_not_overwritten_silently(stopped, make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(tmp_path / "toy"), "type": "topk", "runs_dir": str(tmp_path / "runs")}
    with pytest.raises(
        RunExistsError, match=r"continue it with: sae-train resume .*, choose another --name, or replace"
    ):
        train_sae(**settings)
    assert train_sae(**settings, overwrite=True).summary["steps"] == 60
    with pytest.raises(RunExistsError, match=r"exists: choose another --name, or replace it with --overwrite"):
        train_sae(**settings)
    foreign = tmp_path / "runs" / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(RunExistsError, match=r"exists: choose another --name$"):
        train_sae(**settings, name="mine", overwrite=True)
    assert (foreign / "thesis.txt").exists()


def test_a_run_in_training_is_not_overwritten(stopped, tmp_path) -> None:
    """The other process would go on and leave its checkpoints among those of the new run."""
    settings = {**SETTINGS, "cache": str(tmp_path / "toy"), "type": "topk", "runs_dir": str(tmp_path / "runs")}
    before = sorted(stopped.rglob("*"))
    with exclusive(stopped), pytest.raises(RunExistsError, match=r"is being trained by process \d+"):
        train_sae(**settings, overwrite=True)
    assert sorted(stopped.rglob("*")) == before


def test_a_run_that_starts_from_itself_is_not_overwritten(stopped, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(tmp_path / "toy"), "type": "topk", "runs_dir": str(tmp_path / "runs")}
    before = sorted(stopped.rglob("*"))
    for start in (stopped, checkpoint.list_checkpoints(stopped)[-1]):
        with pytest.raises(ConfigError, match=r"init_from=.* is inside .*, which --overwrite removes: choose another"):
            train_sae(**settings, overwrite=True, init_from=str(start))
    assert sorted(stopped.rglob("*")) == before


def test_resume_auto_refuses_another_cache(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "steps": 8, "type": "topk", "runs_dir": str(tmp_path / "runs"), "name": "a"}
    train_sae(**settings, cache=str(make_cache()))
    (tmp_path / "link").symlink_to(tmp_path / "toy")
    assert train_sae(**settings, cache=str(tmp_path / "link"), resume="auto").summary["steps"] == 8
    with pytest.raises(RunExistsError, match=r"was started with other settings \(cache=.*toy, now .*other\)"):
        train_sae(**settings, cache=str(make_cache("other", seed=1)), resume="auto")
