"""Interrupted and continued: bitwise the same weights and batches, and only for what the checkpoint belongs to."""

import json
import multiprocessing
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train.checkpoint
import train.data
from cache.loader import LoaderState
from train import resume_training, train_sae
from train.errors import CheckpointError, InterruptedRunError, NotARunError, RunExistsError
from train.log import TIMING, BaseSink, read_metrics
from train.optim import OPTIMIZERS
from train.rng import Rng
from train.signals import StopRequest

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
    native = [train.checkpoint.list_checkpoints(f)[-1] for f in (a, b)]
    for file in ("sae/sae.safetensors", "optimizer.safetensors", "rng.safetensors"):
        assert (native[0] / file).read_bytes() == (native[1] / file).read_bytes(), file
    summaries = [json.loads((f / "summary.json").read_text()) for f in (a, b)]
    for name in ("steps", "tokens", "l0_train", "dead", "eval", "rows"):
        assert summaries[0][name] == summaries[1][name], name


CASES = [("jumprelu", "adam"), *(("batchtopk", optimizer) for optimizer in OPTIMIZERS)]


@pytest.mark.parametrize(("type", "optimizer"), CASES)
def test_a_stopped_run_continues_bitwise(make_cache, tmp_path, type, optimizer) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": type, "optimizer": optimizer, "pool_rows": 1500}
    if type == "jumprelu":
        settings.pop("k")
    whole = train_sae(**settings, runs_dir=str(tmp_path / "a")).folder
    folder = interrupted(23, **settings, runs_dir=str(tmp_path / "b"))
    assert not (folder / "summary.json").exists()
    again = resume_training(folder)
    assert again.folder == folder
    assert_same(whole, folder)


def test_parts_that_a_resume_restores_all_matter(make_cache, tmp_path, monkeypatch) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "batchtopk", "dead_after_tokens": 130, "k": 2}
    whole = train_sae(**settings, runs_dir=str(tmp_path / "a")).folder
    stopped = interrupted(23, **settings, runs_dir=str(tmp_path / "b"))

    def without(name: str, disable) -> Path:
        copy = tmp_path / name
        shutil.copytree(stopped, copy)
        with monkeypatch.context() as patch:
            disable(patch)
            return resume_training(copy).folder

    original = train.checkpoint.load

    def patched(change):
        def load(*args):
            restored = original(*args)
            change(restored)
            return restored

        return load

    def forget_state(patch):
        patch.setattr(
            train.checkpoint,
            "load",
            lambda *a: replace(original(*a), loader_state=LoaderState(0)),
        )

    changes = {
        "optimizer": lambda p: p.setattr(train.checkpoint, "load_state_tensors", lambda *a: None),
        "loader": forget_state,
        "dead": lambda p: p.setattr(
            train.checkpoint, "load", patched(lambda r: r.run.sae.num_tokens_since_fired.zero_())
        ),
        "threshold": lambda p: p.setattr(train.checkpoint, "load", patched(lambda r: r.run.sae.threshold.ema.zero_())),
        "step": lambda p: p.setattr(train.checkpoint, "load", patched(lambda r: setattr(r.run, "step", 20))),
        "rng": lambda p: p.setattr(train.checkpoint, "load", patched(lambda r: setattr(r.run, "rng", Rng.seeded(123)))),
    }
    for name, disable in changes.items():
        try:
            assert_same(whole, without(name, disable))
        except AssertionError:
            continue
        pytest.fail(f"nothing changes without {name}")
    assert_same(whole, without("nothing", lambda p: None))


def start(target, **kwargs):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.run", "sae_core.variants.topk"])
    process = context.Process(target=target, kwargs=kwargs)
    process.start()
    return process


@pytest.mark.parametrize("n_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_instants(make_cache, tmp_path, n_kills) -> None:
    from train.run import resume_training, train_sae

    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "name": "run"}
    for runs_dir in ("warm", "a"):  # the first one also waits for the server's imports
        before = time.perf_counter()
        process = start(train_sae, **settings, runs_dir=str(tmp_path / runs_dir))
        process.join()
        duration = time.perf_counter() - before
        assert process.exitcode == 0
    rng = random.Random(n_kills)
    folder = tmp_path / "b" / "run"
    killed = 0
    for i in range(100):
        begun = (folder / "run.json").is_file()
        process = (
            start(resume_training, folder=folder)
            if begun
            else start(train_sae, **settings, runs_dir=str(tmp_path / "b"))
        )
        process.join(rng.uniform(0.0, duration) if killed < n_kills else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        elif (folder / "summary.json").is_file():
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


def test_keep_and_names_of_checkpoints(make_cache, tmp_path) -> None:
    result = train_sae(cache=str(make_cache()), type="topk", runs_dir=str(tmp_path), keep=3, **SETTINGS)
    kept = [p.name for p in train.checkpoint.list_checkpoints(result.folder)]
    assert kept == ["step_00000049", "step_00000056", "step_00000060"]
    files = sorted(str(p.relative_to(result.folder)) for p in (result.folder / "checkpoints").rglob("*") if p.is_file())
    assert not [f for f in files if not f.endswith((".json", ".safetensors"))]


@pytest.fixture
def stopped(make_cache, tmp_path) -> Path:
    return interrupted(23, cache=str(make_cache()), type="topk", runs_dir=str(tmp_path / "runs"), **SETTINGS)


def newest(folder: Path) -> Path:
    return train.checkpoint.list_checkpoints(folder)[-1]


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
    state.write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match=r"checkpoint format 2, this version reads 1"):
        resume_training(stopped)
    state.write_text(text.replace('"rng.safetensors"', '"../../../rng.safetensors"'))
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


def test_moved_run_continues(stopped, tmp_path) -> None:
    moved = tmp_path / "elsewhere"
    stopped.rename(moved)
    assert resume_training(moved).folder == moved
