"""Sinks: jsonl always, a console, wandb offline for real; none of them stops a run."""

import io
import json
import socket
import time
from pathlib import Path

import pytest
from fork_kit import LIMIT
from rich.console import Console

from sae_granary import train_sae
from sae_granary.common.finished_run import read_metrics
from sae_granary.train.result import notes
from sae_granary.train.result.notes import slow_rows
from sae_granary.train.sinks import console_sink
from sae_granary.train.sinks.chart_names import charted
from sae_granary.train.sinks.console_sink import ConsoleSink
from sae_granary.train.sinks.jsonl_sink import JsonlSink
from sae_granary.train.sinks.sink import BaseSink, Sinks
from sae_granary.train.state.clock import Clock

SETTINGS = {"type": "batchtopk", "k": 4, "batch_size": 128, "steps": 20, "eval_rows": 300}


def line(step: int) -> dict[str, float]:
    return {
        "step": step,
        "tokens": step * 10,
        "loss": 1.0,
        "l0": 4.0,
        "fvu": 0.5,
        "dead": 0.0,
        "tokens_per_second": 1e4,
    }


class Recorder(BaseSink):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[int] = []

    def metrics(self, metrics) -> None:
        self.steps.append(metrics["step"])

    def message(self, text) -> None:
        self.messages.append(text)


def test_jsonl_is_cut_back_to_the_step_of_a_resume(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line(s)) + "\n" for s in (1, 10, 20, 30)) + '{"step": 40, "lo'
    )
    sink = JsonlSink(tmp_path)
    sink.start("x", {}, 100, 20)
    sink.metrics(line(25))
    sink.flush()
    sink.close()
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 10, 20, 25]


def test_lines_that_a_kill_cut_off_are_dropped(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n{"step": 3}}\n{"step": 2')
    assert read_metrics(tmp_path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none") == []


def test_a_failing_sink_is_dropped_and_told(tmp_path) -> None:
    class Broken(BaseSink):
        def metrics(self, metrics) -> None:
            raise ConnectionError("no route")

    recorder = Recorder()
    sinks = Sinks([Broken(), recorder])
    sinks.metrics(line(1))
    sinks.metrics(line(2))
    assert recorder.steps == [1, 2]
    assert recorder.messages == ["Broken failed and is left out from here on: ConnectionError('no route')"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_not_ignored(tmp_path) -> None:
    sink = JsonlSink(tmp_path)
    sink.start("x", {}, 10, 0)
    sink.path.unlink()
    sink.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        Sinks([sink]).metrics(line(1))


def test_wandb_offline_writes_the_history_and_touches_no_network(make_cache, tmp_path, monkeypatch) -> None:
    original = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            pytest.fail(f"connection to {address}")
        return original(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    path = make_cache()
    recorder = Recorder()
    result = train_sae(
        cache=str(path),
        runs_dir=str(tmp_path / "runs"),
        wandb="offline",
        wandb_project="of-mine",
        wandb_artifacts=True,
        sinks=[recorder],
        **SETTINGS,
    )
    assert not recorder.messages
    run_id = json.loads((result.folder / "run.json").read_text())["wandb_id"]
    [file] = (result.folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.name == f"run-{run_id}.wandb"
    wanted = [
        b"metrics/l0",
        b"metrics/explained_variance",
        b"sparsity/dead_features",
        b"losses/overall_loss",
        b"of-mine",
        b"sae_weights.safetensors",
    ]
    deadline = time.monotonic() + LIMIT  # wandb's own process writes a moment later
    while missing := [name for name in wanted if name not in file.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)


def test_wandb_names_cover_what_is_logged(make_cache, tmp_path) -> None:
    result = train_sae(cache=str(make_cache()), runs_dir=str(tmp_path / "runs"), **SETTINGS)
    lines = read_metrics(result.folder)
    charts = set(charted({name: value for line in lines for name, value in line.items()}))
    assert {
        "losses/overall_loss", "losses/mse_loss", "losses/fvu", "metrics/explained_variance", "metrics/l0",
        "metrics/mean_log10_feature_sparsity", "sparsity/dead_features", "sparsity/mean_passes_since_fired",
        "details/current_learning_rate", "details/n_training_samples", "details/grad_norm/W_enc",
    } <= charts  # fmt: skip
    assert all(name.startswith(("losses/", "details/", "metrics/", "sparsity/")) for name in charts), charts


def test_a_broken_wandb_does_not_stop_a_run(make_cache, tmp_path, monkeypatch) -> None:
    import wandb

    def fail(**kwargs):
        raise wandb.errors.CommError("server is down")

    monkeypatch.setattr(wandb, "init", fail)
    out = io.StringIO()
    console = ConsoleSink(Console(file=out, width=200))
    result = train_sae(
        cache=str(make_cache()), runs_dir=str(tmp_path / "runs"), wandb="offline", sinks=[console], **SETTINGS
    )
    assert result.summary["steps"] == 20
    assert "WandbSink failed and is left out from here on" in out.getvalue()


def test_tensorboard_files_hold_the_history(make_cache, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {**SETTINGS, "tensorboard": True}
    folder = train_sae(cache=str(make_cache()), runs_dir=str(tmp_path / "runs"), **settings).folder
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    fvu = [(event.step, event.value) for event in events.Scalars("metrics/fvu")]
    assert fvu == [(line["step"], pytest.approx(line["fvu"])) for line in read_metrics(folder)]
    assert [event.step for event in events.Histograms("plots/feature_density_line_chart")] == [20]


def test_console_prints_plain_lines_off_a_terminal(monkeypatch) -> None:
    monkeypatch.setattr(console_sink, "PLAIN_SECONDS", 1000.0)
    out = io.StringIO()
    sink = ConsoleSink(Console(file=out, width=200))
    sink.start("name", {"run": {"cache": "c", "seed": 0, "name": None, "hook": ["a", "b"]}}, 100, 0)
    sink.metrics(line(1))
    sink.metrics(line(2))  # too soon after the first
    sink.metrics(line(100))  # the last one is always shown
    sink.message("watch [this]")
    sink.close()
    text = out.getvalue().splitlines()
    assert text[0].split() == ["run", "cache=c", "seed=0", "hook=a,b"]
    assert text[1] == "step 1/100  loss 1.0000  L0 4.0  FVU 0.5000  dead 0.0%  10.0k tok/s  0.1 s left"
    assert text[2].startswith("step 100/100")
    assert text[3] == "watch [this]"
    assert "\x1b" not in out.getvalue()


def test_console_is_live_on_a_terminal() -> None:
    out = io.StringIO()
    sink = ConsoleSink(Console(file=out, width=120, force_terminal=True))
    sink.start("run [x]", {}, 10, 0)
    sink.metrics(line(5))
    sink.close()
    assert "run [x]" in out.getvalue()
    assert "FVU 0.5000" in out.getvalue()


def test_own_sinks_see_the_run(make_cache, tmp_path) -> None:
    class Own(BaseSink):
        def __init__(self) -> None:
            self.calls: list[str] = []

        def start(self, name, config, n_steps, step) -> None:
            self.calls.append(f"start {n_steps} {step}")

        def metrics(self, metrics) -> None:
            self.calls.append(f"metrics {metrics['step']}")

        def finish(self, summary) -> None:
            self.calls.append(f"finish {summary['steps']}")

        def close(self) -> None:
            self.calls.append("close")

    own = Own()
    train_sae(cache=str(make_cache()), runs_dir=str(tmp_path), sinks=[own], **SETTINGS)
    assert own.calls == ["start 20 0", "metrics 1", "metrics 10", "metrics 20", "finish 20", "close"]
    assert Path(tmp_path).is_dir()


def test_a_training_that_waits_for_its_rows_says_so(monkeypatch) -> None:
    monkeypatch.setattr(notes, "WAITED_SECONDS", 10.0)
    clock = Clock(seconds=0.0, tokens=0)
    clock.wait(500.0)  # the first batch
    clock.wait(30.0)
    clock.wait(30.0)
    clock._here += 140.0  # of steps
    assert clock.waited == (60.0, 0.3)
    (note,) = slow_rows(*clock.waited)
    assert note.startswith(
        "30% of the training time was spent on waiting for rows: reading is the limit, not the steps; copy"
    )
    assert slow_rows(60.0, 0.1) == slow_rows(2.0, 0.9) == slow_rows(*Clock(0.0, 0).waited) == []
