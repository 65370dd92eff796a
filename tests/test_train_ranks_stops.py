"""Ranks that disagree, are missing, die or are stopped: one line that names the rank, and nothing lost."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_kit import LIMIT, Forks, command, last_line
from rank_kit import COMMON, Job, ended, start

from sae_granary import load_sae, resume_training, train_sae, train_sweep
from sae_granary.common.finished_run import read_summary
from sae_granary.common.signals import StopRequest
from sae_granary.train.callbacks import StepEvent
from sae_granary.train.errors import InterruptedRunError
from sae_granary.train.ranks import run
from sae_granary.train.state.checkpoint import list_checkpoints
from sae_granary.train.trainer import Trainer

pytestmark = pytest.mark.slow


def job(cache: Path, runs: Path, **settings: object) -> Job:
    """A rank that trains a run of these tests."""
    values = {**COMMON, "cache": cache, "type": "batchtopk", "k": 3, "runs_dir": runs, "name": "run", **settings}
    flags = [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return command, "sae_granary.train", "run", *flags


def signaled(signum: int, ranks: Sequence[int], step: int, *args: str) -> None:
    """Train; ranks get a signal before they take this step."""
    take = Trainer.take

    def signal_first(self: Trainer, *given: Any) -> None:
        if int(os.environ["RANK"]) in ranks and self.run.step == step - 1:
            os.kill(os.getpid(), signum)
        take(self, *given)

    Trainer.take = signal_first  # type: ignore[method-assign]
    command(*args)


def in_folder(folder: Path, *args: str) -> None:
    """Train where the same path is another cache."""
    os.chdir(folder)
    command(*args)


def of_version(version: str, *args: str) -> None:
    """Train with another version of this package."""
    run.__version__ = version
    command(*args)


def test_ranks_that_disagree(make_cache: Callable[..., Path], tmp_path: Path, forks: Forks) -> None:
    here, there = make_cache("here/toy").parent, make_cache("there/toy", seed=1).parent
    _, *flags = job(Path("toy"), tmp_path / "runs")
    asked = "start all ranks with the same command, version and cache"
    for other, complaint in (
        (
            (in_folder, here, *job(Path("toy"), tmp_path / "runs", batch_size=96)[1:]),
            "has batch_size=96, rank 0 has 102",
        ),
        ((of_version, "0.0", *flags), "has version='0.0', rank 0 has"),
    ):
        jobs = [(in_folder, here, *flags), other]
        for code, output in ended(start(forks, jobs)):
            assert code == 2, output
            assert complaint in output
            assert asked in output
        assert not (tmp_path / "runs").exists()
    (first, output), (second, told) = ended(start(forks, [(in_folder, here, *flags), (in_folder, there, *flags)]))
    assert (first, second) == (2, 2), output + told
    assert "error: toy holds " in told
    assert "error: rank 1 stopped: toy holds " in output


def test_a_rank_that_does_not_come(make_cache: Callable[..., Path], tmp_path: Path, forks: Forks) -> None:
    jobs = [job(make_cache(), tmp_path / "runs"), (time.sleep, 0)]
    (code, output), _ = ended(start(forks, jobs, GRANARY_RANK_TIMEOUT="2"))
    assert code == 2, output
    assert "rank 1 of 2 did not come to 127.0.0.1:" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_is_named(
    rank: int, by: signal.Signals, make_cache: Callable[..., Path], tmp_path: Path, forks: Forks
) -> None:
    _, *flags = job(make_cache(), tmp_path, save_every=20, log_every=10)
    timeout = "15" if by == signal.SIGSTOP else str(LIMIT)  # seconds, of silence
    processes = start(forks, [(signaled, by, [rank], 30, *flags)] * 2, GRANARY_RANK_TIMEOUT=timeout)
    ((code, output),) = ended([processes[1 - rank]])
    processes[rank].end()
    assert code == 2, output
    assert last_line(output).startswith("error: ")
    assert f"rank {rank} (" in last_line(output)
    assert list_checkpoints(tmp_path / "run")


def test_one_batch_log_over_two_then_one_then_three_ranks(
    make_cache: Callable[..., Path], tmp_path: Path, forks: Forks
) -> None:
    cache = make_cache()
    settings = {**COMMON, "type": "batchtopk", "k": 3, "steps": 300, "log_every": 10, "save_every": 50}
    alone = train_sae(cache=str(cache), **settings, runs_dir=str(tmp_path), name="alone")
    _, *flags = job(cache, tmp_path, steps=300, log_every=10, save_every=50)
    for code, output in ended(start(forks, [(signaled, signal.SIGTERM, [1], 75, *flags)] * 2)):
        assert code == 143, output
        assert "stopped by signal 15 after step" in output

    stop = StopRequest()

    def stop_at_200(event: StepEvent) -> None:
        stop.signum = signal.SIGTERM if event.step == 200 else None

    assert list_checkpoints(tmp_path / "run")[-1].name == "step_00000075"
    with pytest.raises(InterruptedRunError):
        resume_training(tmp_path / "run", callbacks=[stop_at_200], stop=stop)
    assert list_checkpoints(tmp_path / "run")[-1].name == "step_00000200"
    resumed = ended(start(forks, [(command, "sae_granary.train", "resume", str(tmp_path / "run"))] * 3))
    assert [code for code, _ in resumed] == [0, 0, 0], resumed
    ours, theirs = (read_summary(tmp_path / name) for name in ("alone", "run"))
    assert theirs["tokens"] == ours["tokens"]
    assert theirs["eval"]["fvu"] == pytest.approx(ours["eval"]["fvu"], rel=0.005)
    batches = [
        {
            line["step"]: (line["epoch"], line["cursor"], line["tokens"])
            for line in map(json.loads, path.read_text().splitlines())
        }
        for path in (tmp_path / name / "metrics.jsonl" for name in ("alone", "run"))
    ]
    assert batches[0].items() <= batches[1].items()  # a resumed run also logs its first step
    difference = load_sae(tmp_path / "run").W_dec.detach() - alone.sae.core.W_dec.detach()
    assert float(difference.norm() / torch.ones(()).mul(len(difference)).sqrt()) < 0.05


def test_a_sweep_is_divided_and_the_saes_of_a_dead_rank_are_taken_over(
    make_cache: Callable[..., Path], tmp_path: Path, forks: Forks
) -> None:
    cache = make_cache()
    given = {"steps": 300, "save_every": 20, "name": "ks"}
    flags = list(job(cache, tmp_path, **given)[3:])
    del flags[flags.index("--k") : flags.index("--k") + 2]
    sweep = (command, "sae_granary.train", "sweep", *flags, "--grid", "k=2,3,4,5")
    killed = (signaled, signal.SIGKILL, [1], 30, *sweep[1:])
    (code, output), _ = ended(start(forks, [killed] * 2, GRANARY_RANK_TIMEOUT="15"))
    assert code == 2, output
    assert "rank 1 (" in output
    rows = json.loads((tmp_path / "ks" / "results.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "failed"]
    again = ended(start(forks, [sweep] * 3))
    assert [code for code, _ in again] == [0, 0, 0], again
    rows = json.loads((tmp_path / "ks" / "results.json").read_text())["rows"]
    settings = {**COMMON, "type": "batchtopk", **given, "name": "alone"}
    alone = train_sweep({"k": [2, 3, 4, 5]}, cache=str(cache), **settings, runs_dir=str(tmp_path))
    assert [row["fvu"] for row in rows] == pytest.approx([row["fvu"] for row in alone.rows], rel=1e-4)
