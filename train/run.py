"""A whole run: from a config to runs/<name>/, and from a checkpoint onwards.

runs/<name>/
    config.yaml              every setting, resolved
    run.json                 pinned shards, row accounting, what the run belongs to
    metrics.jsonl            one line per `log_every` steps
    checkpoints/step_N/      native form and trainer state
    cfg.json  sae_weights.safetensors  granary.json     the result in inference form
    summary.json             written last: the run is complete
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

import sae_core
from cache.loader import Batch, Loader, LoaderState
from sae_core import SAE
from train import checkpoint, files, loop
from train.config import TrainConfig, from_sections, make_config, to_sections, to_yaml
from train.data import Data, export_metadata
from train.errors import ConfigError, InterruptedRunError, NotARunError, RunExistsError
from train.evaluate import evaluate
from train.log import METRICS_FILE, JsonlSink, Sink, Sinks
from train.signals import StopRequest
from train.state import Run, build_sae

CONFIG, RECORD, SUMMARY = "config.yaml", "run.json", "summary.json"
RECORD_VERSION = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """A trained SAE in evaluation mode, its folder, and the final numbers."""

    sae: SAE
    folder: Path
    summary: Mapping[str, Any]


def train_sae(
    config: TrainConfig | None = None,
    *,
    sinks: Sequence[Sink] = (),
    overwrite: bool = False,
    stop: StopRequest | None = None,
    **settings: Any,
) -> Result:
    """Train an SAE from a cache: `train_sae(cache="cache/bert_l6", type="topk", k=32)`.

    Settings are those of `TrainConfig` and of the variant; together with a `config` they replace its values.
    Everything that can be wrong is told before anything is written (ConfigError, CacheError, SAEError).
    """
    config = make_config([settings]) if config is None else _replace(config, settings)
    data = Data.open(config)
    folder = claim_folder(data.config, overwrite=overwrite)
    with ExitStack() as stack:
        wandb_id = secrets.token_hex(8)
        session = _open_session(stack, data, folder, None, _all_sinks(data.config, folder, wandb_id, sinks), stop)
        files.write_text(folder / CONFIG, to_yaml(data.config))
        counts = data.counts.to_json()
        record = {"version": RECORD_VERSION, "counts": counts, **asdict(session.identity), "wandb_id": wandb_id}
        files.write_json(folder / RECORD, record)  # from here on the run can be resumed
        return session.execute(_fresh_run(session))


def resume_training(folder: str | Path, *, sinks: Sequence[Sink] = (), stop: StopRequest | None = None) -> Result:
    """Continue a run from its newest checkpoint, bit for bit as if it had never stopped (on the same machine).

    Raises NotARunError, CheckpointError (damaged, or another cache), RunExistsError (already complete).
    """
    folder = Path(folder)
    config, record = read_run(folder)
    if (folder / SUMMARY).is_file():
        raise RunExistsError(f"{folder} is complete; its result is in {folder / SUMMARY}")
    files.remove_temporary(folder / checkpoint.FOLDER)
    data = Data.reopen(config, record)
    found = checkpoint.list_checkpoints(folder)
    identity = checkpoint.Identity(dict(data.cache.manifest.fingerprint), record["order"])
    checkpoint.check_identity({"cache": record["cache"], "order": record["order"]}, asdict(identity), folder / RECORD)
    with ExitStack() as stack:
        restored = checkpoint.load(found[-1], config, identity) if found else None
        state = restored.loader_state if restored else None
        all_sinks = _all_sinks(config, folder, str(record["wandb_id"]), sinks)
        session = _open_session(stack, data, folder, state, all_sinks, stop)
        checkpoint.check_identity(asdict(identity), asdict(session.identity), folder / RECORD)
        if restored is None:
            return session.execute(_fresh_run(session))
        return session.execute(restored.run, restored.seconds)


@dataclass(frozen=True)
class Session:
    """What a run needs besides its own state: data, batches, a folder, sinks, and when to stop."""

    data: Data
    loader: Loader
    folder: Path
    sinks: Sinks
    stop: StopRequest

    @property
    def identity(self) -> checkpoint.Identity:
        """What checkpoints belong to."""
        return self.data.identity(self.loader)

    def execute(self, run: Run, seconds: float = 0.0) -> Result:
        """Train to the end, calibrate, evaluate, write the result."""
        config = self.data.config
        self.sinks.start(self.folder.name, to_sections(config), run.n_steps, run.step)
        clock = Clock(seconds, run.tokens)
        last: dict[str, Any] = {}

        def on_step(run: Run, batch: Batch, result: loop.StepResult) -> None:
            if result.metrics or not result.accepted:
                line = metrics_of(run, batch, result, clock)
                last.update(line)
                self.sinks.metrics(line)
            due = config.save_every > 0 and run.step % config.save_every == 0
            if due or self.stop or run.done:
                self._save(run, batch.state, clock)
            if self.stop and not run.done:
                raise self._interrupted(run)

        if not run.done:
            loop.train(run, self.loader, measure_every=config.log_every, on_step=on_step)
            self.loader.close()
        seconds = clock.seconds
        run.sae.calibrate(self._until_stopped(self.data.calibration(), run))
        numbers = evaluate(run.sae, self._until_stopped(self.data.evaluation(), run))
        summary = summarize(run, self.data, numbers, _last_training_l0(self.folder, last), seconds)
        return self._finish(run, summary)

    def _save(self, run: Run, state: LoaderState, clock: Clock) -> None:
        self.sinks.flush()
        checkpoint.save(self.folder, run, state, self.identity, seconds=clock.seconds)

    def _finish(self, run: Run, summary: Mapping[str, Any]) -> Result:
        for path in sae_core.save(run.sae, self.folder, export_metadata(self.data, self.folder)):
            files.sync_file(path)
        self.sinks.finish(summary)
        self.sinks.flush()
        files.write_json(self.folder / SUMMARY, summary)
        return Result(run.sae.eval(), self.folder, summary)

    def _until_stopped(self, items: Iterable[T], run: Run) -> Iterator[T]:
        for item in items:
            if self.stop:
                raise self._interrupted(run)
            yield item

    def _interrupted(self, run: Run) -> InterruptedRunError:
        assert self.stop.signum is not None
        return InterruptedRunError(self.stop.signum, run.step, self.folder)


class Clock:
    """Training time over interruptions, and the rate since the process started."""

    def __init__(self, seconds: float, tokens: int) -> None:
        self._before, self._tokens, self._start = seconds, tokens, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier processes included."""
        return self._before + time.perf_counter() - self._start

    def rate(self, tokens: int) -> float:
        """Rows per second in this process."""
        return (tokens - self._tokens) / max(time.perf_counter() - self._start, 1e-9)


def metrics_of(run: Run, batch: Batch, result: loop.StepResult, clock: Clock) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    dead = int(run.sae.dead_mask.sum())
    wanted = {name: result.metrics[name] for name in ("l0", "fvu", "explained_variance") if name in result.metrics}
    numbers = {
        "step": run.step,
        "tokens": run.tokens,
        "epoch": batch.state.epoch,
        "cursor": batch.state.cursor,
        "loss": result.loss,
        **{f"losses/{name}": value for name, value in result.losses.items()},
        **wanted,
        **{f"details/{name}": value for name, value in result.details.items()},
        "dead": dead / run.sae.config.d_sae,
        "n_dead": dead,
        "grad_norm": result.grad_norm,
        "lr": run.optimizer.param_groups[0]["lr"],
        "rejected": run.rejected,
        "seconds": round(clock.seconds, 3),
        "tokens_per_second": round(clock.rate(run.tokens), 1),
    }
    return {name: value for name, value in numbers.items() if value == value}  # a rejected batch: JSON has no NaN


def summarize(
    run: Run, data: Data, numbers: Mapping[str, float], l0_train: float | None, seconds: float
) -> dict[str, Any]:
    """summary.json: what was trained, and how good it is."""
    config = data.config
    return {
        "name": config.name,
        "type": config.type,
        "cache": config.cache,
        "hook": list(config.hook),
        "d_in": config.options["d_in"],
        "d_sae": config.options["d_sae"],
        "k": config.options.get("k"),
        "steps": run.step,
        "tokens": run.tokens,
        "rejected": run.rejected,
        "l0_train": l0_train,
        "dead": float(run.sae.dead_mask.float().mean()),
        "dead_after_tokens": config.options.get("dead_after_tokens"),
        "eval_part": data.eval_part,
        "eval": dict(numbers),
        "rows": data.counts.to_json(),
        "device": config.device,
        "versions": {"torch": torch.__version__},
        "seconds": round(seconds, 3),
        "tokens_per_second": round(run.tokens / max(seconds, 1e-9), 1),
    }


def claim_folder(config: TrainConfig, *, overwrite: bool) -> Path:
    """Make the run's folder. Raises RunExistsError if it holds anything and may not be replaced."""
    assert config.name is not None
    folder = Path(config.runs_dir) / config.name
    if Path(config.name).name != config.name or config.name in (".", ".."):
        raise ConfigError(f"name={config.name!r}: expected one folder name, without slashes")
    if folder.exists() and not _is_unused(folder):
        ours = (folder / RECORD).is_file()
        if not (overwrite and ours):
            continued = (
                "" if (folder / SUMMARY).is_file() or not ours else f"continue it with: sae-train resume {folder}, "
            )
            replaced = ", or replace it with --overwrite" if ours else ""
            raise RunExistsError(f"{folder} exists: {continued}choose another --name{replaced}")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_unused(folder: Path) -> bool:
    """Whether a folder holds nothing but what a start leaves that was killed at once."""
    if not folder.is_dir():
        return False
    return all(p.name == CONFIG or p.name.startswith(files.TEMP_PREFIX) for p in folder.iterdir())


def read_run(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The resolved config and the record of a run's folder. Raises NotARunError."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        content = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotARunError(f"{folder} holds no run: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise NotARunError(f"{folder}: the run's files cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(record, dict) or record.get("version") != RECORD_VERSION:
        raise NotARunError(f"{folder}: not a run of a version that this one reads (expected {RECORD_VERSION})")
    return from_sections(content, str(folder / CONFIG)), record


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run. Raises NotARunError."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = f"; continue it with: sae-train resume {folder}" if (folder / RECORD).is_file() else ""
        raise NotARunError(f"{folder} holds no finished run{remedy}") from None
    except (OSError, ValueError) as error:
        raise NotARunError(f"{folder / SUMMARY} cannot be read: {error}") from None
    if not isinstance(summary, dict) or not isinstance(summary.get("eval"), dict):
        raise NotARunError(f"{folder / SUMMARY} is not the summary of a run")
    return summary


def _fresh_run(session: Session) -> Run:
    """Build and initialise the SAE from a sample of training rows."""
    config = session.data.config
    assert config.init_seed is not None
    torch.manual_seed(config.init_seed)
    sae = build_sae(config)
    sae.initialize(session.data.sample(), torch.Generator().manual_seed(config.init_seed))
    run = Run.create(config, sae)
    if session.stop:
        raise session._interrupted(run)
    return run


def _open_session(
    stack: ExitStack,
    data: Data,
    folder: Path,
    state: LoaderState | None,
    sinks: Sinks,
    stop: StopRequest | None,
) -> Session:
    stack.callback(sinks.close)
    loader = stack.enter_context(data.batches(state))
    if data.eval_part != "heldout":
        sinks.message("no document is held out: the final evaluation uses training rows")
    return Session(data, loader, folder, sinks, StopRequest() if stop is None else stop)


def _all_sinks(config: TrainConfig, folder: Path, wandb_id: str, extra: Sequence[Sink]) -> Sinks:
    sinks: list[Sink] = [JsonlSink(folder)]
    if config.wandb != "off":
        from train.wandb_sink import WandbSink

        sinks.append(WandbSink(folder, config.wandb_project, config.wandb, wandb_id))
    return Sinks([*sinks, *extra])


def _last_training_l0(folder: Path, last: Mapping[str, Any]) -> float | None:
    """L0 of the training activation on the last measured batch; from the file when no step was left to take."""
    if "l0" in last:
        return float(last["l0"])
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    values = [line["l0"] for line in found if "l0" in line]
    return float(values[-1]) if values else None


def _replace(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """A config with some settings changed, checked as all settings are."""
    own = {k: v for k, v in settings.items() if k in TrainConfig.__dataclass_fields__ and k != "options"}
    options = {k: v for k, v in settings.items() if k not in own}
    checked = make_config([{"type": own.get("type", config.type), **own, **options}]) if settings else config
    changed = {k: getattr(checked, k) for k in own}
    return replace(config, **changed, options={**config.options, **checked.options}) if settings else config
