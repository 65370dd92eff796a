"""Between two steps a run reads nothing from its device, and on a GPU its lines are written one step later."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_granary import train_sae
from sae_granary.common.finished_run import read_metrics
from sae_granary.train import loop
from sae_granary.train.callbacks import Callback
from sae_granary.train.sinks import metrics_line
from sae_granary.train.sinks.sink import TIMING
from sae_granary.train.trainer import Trainer

SETTINGS: dict[str, Any] = {
    "type": "batchtopk",
    "k": 4,
    "d_sae": 64,
    "batch_size": 64,
    "device": "cpu",
    "eval_rows": 200,
}
READS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default", "aten.masked_select.default"}


class Reads(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on and str(func) in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def reads_by_step(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[int]:
    """What each call of `Trainer.take` reads outside of the step itself."""
    counts: list[int] = []
    take, step = Trainer.take, loop.train_step

    def counted(self: Trainer, *args: Any) -> None:
        with Reads() as reads, inside(reads):
            take(self, *args)
        counts.append(len(reads.found))

    @contextmanager
    def inside(reads: Reads) -> Iterator[None]:
        def stepped(*args: Any, **options: Any) -> Any:
            reads.on = False
            try:
                return step(*args, **options)
            finally:
                reads.on = True

        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", stepped)
            yield

    monkeypatch.setattr(Trainer, "take", counted)
    train_sae(**SETTINGS, **settings)
    return counts


def test_a_step_that_is_not_measured_reads_nothing_between_steps(make_cache, tmp_path, monkeypatch) -> None:
    given = {"cache": str(make_cache()), "runs_dir": str(tmp_path), "steps": 9, "log_every": 4, "save_every": 0}
    counts = reads_by_step(monkeypatch, **given)
    assert [n for step, n in enumerate(counts, 1) if step not in (1, 4, 8, 9)] == [0] * 5
    assert counts[3] <= 2  # dead latents and the mean silence, which a GPU sends without being waited for


def test_a_measured_step_reads_its_numbers_once(make_cache, tmp_path, monkeypatch) -> None:
    """Everything that a line holds is a tensor until `Readback` takes all of them together."""
    taken: list[int] = []
    original = loop.Measured.__init__

    def counted(self: Any, *args: Any) -> None:
        taken.append(sum(isinstance(value, torch.Tensor) for group in args[:3] for value in group.values()))
        original(self, *args)

    monkeypatch.setattr(loop.Measured, "__init__", counted)
    train_sae(**SETTINGS, cache=str(make_cache()), runs_dir=str(tmp_path), steps=4, log_every=2)
    assert len(taken) == 3
    assert min(taken) >= 1 + 2 + 4  # the loss, threshold and selection_rows, a norm of each parameter


class Seen(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, event: Any) -> dict[str, float] | None:
        self.losses.append(event.result.loss)
        return {"own": 1.0} if event.step == 5 else None


def test_lines_that_are_written_later_are_the_same_in_the_same_order(make_cache, tmp_path, monkeypatch) -> None:
    given = {
        **SETTINGS, "cache": str(make_cache()), "steps": 12, "log_every": 3, "eval_every": 4, "density_every": 6,
        "resample_every": 5, "save_every": 4, "name": "a",
    }  # fmt: skip
    runs = {}
    for name in ("at_once", "later"):
        if name == "later":
            monkeypatch.setattr(metrics_line, "host_waits", lambda tensor: True)
        folder = train_sae(**given, runs_dir=str(tmp_path / name), callbacks=[Seen()]).folder
        lines = [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]
        runs[name] = (lines, (folder / "sae_weights.safetensors").read_bytes())
    assert runs["later"] == runs["at_once"]
    assert [line["step"] for line in runs["later"][0]] == [1, 3, 4, 5, 6, 8, 9, 12]
