"""Memory of the device: what fits is said before the first step, and a run that meets the limit continues."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_granary import resume_training, train_sae
from sae_granary.common.errors import ConfigError
from sae_granary.sae_core import registry
from sae_granary.train.callbacks import StepEvent
from sae_granary.train.config.merge import make_config
from sae_granary.train.data.run_data import RunData
from sae_granary.train.errors import MemoryLimitError
from sae_granary.train.memory import capacity
from sae_granary.train.state.run_state import build_sae
from sae_granary.train.step_input import RowInput

SETTINGS = {"d_sae": 64, "batch_size": 64, "steps": 8, "save_every": 2, "eval_rows": 200, "device": "cpu"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    from conftest import write_cache

    return str(write_cache(tmp_path_factory.mktemp("memory") / "toy", n_docs=20, d_in=8, hooks=("a", "b")))


class Device:
    """A device whose memory holds the step of so many rows from a call on; the last micro-batch is the one too many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_rows: int, after: int = 0) -> None:
        self.n_rows, self.left = n_rows, after
        original = RowInput.terms

        def terms(rows: RowInput, *args: Any) -> Any:
            found = original(rows, *args)
            self.left -= 1
            if self.left < 0 and rows.n_rows > self.n_rows:
                raise torch.OutOfMemoryError("stub")
            return found

        monkeypatch.setattr(RowInput, "terms", terms)


def weights(folder: Path) -> bytes:
    return (folder / "sae_weights.safetensors").read_bytes()


@pytest.mark.parametrize(("type_name", "words"), [
    ("topk", "rows at once: from here on in micro-batches of 16 (grad_acc_steps=4)"),
    ("batchtopk", "batchtopk selects: the result differs from that of whole batches"),
])  # fmt: skip
def test_an_out_of_memory_halves_the_micro_batches(cache, tmp_path, monkeypatch, type_name, words) -> None:
    given = {**SETTINGS, "cache": cache, "hook": "a", "type": type_name, "k": 4}
    small = train_sae(**given, grad_acc_steps=4, runs_dir=str(tmp_path / "small"))
    Device(monkeypatch, n_rows=16)
    found = train_sae(**given, runs_dir=str(tmp_path / "found"))
    assert weights(found.folder) == weights(small.folder)
    notes = [note for note in found.summary["notes"] if note.startswith("out of memory in step 1")]
    assert len(notes) == 2
    assert words in notes[1]


def test_a_step_that_did_not_fit_leaves_nothing_behind(cache, tmp_path, monkeypatch) -> None:
    """Neither gradients nor counters: the third of four micro-batches is the one that does not fit."""
    given = {**SETTINGS, "cache": cache, "hook": "a", "type": "batchtopk", "k": 4, "steps": 1}
    small = train_sae(**given, grad_acc_steps=8, runs_dir=str(tmp_path / "small"))
    Device(monkeypatch, n_rows=8, after=2)
    found = train_sae(**given, grad_acc_steps=4, runs_dir=str(tmp_path / "found"))
    assert weights(found.folder) == weights(small.folder)


def test_smaller_micro_batches_outlive_a_kill(cache, tmp_path, monkeypatch) -> None:
    given = {**SETTINGS, "cache": cache, "hook": "a", "type": "topk", "k": 4}

    def stop(event: StepEvent) -> None:
        if event.step == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        Device(patch, n_rows=32, after=2)
        whole = train_sae(**given, runs_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        Device(patch, n_rows=32, after=2)
        with pytest.raises(KeyboardInterrupt):
            train_sae(**given, runs_dir=str(tmp_path / "killed"), callbacks=[stop])
    resumed = resume_training(next((tmp_path / "killed").iterdir()))  # where there would be room again
    assert weights(resumed.folder) == weights(whole.folder)
    assert resumed.summary["notes"][0].startswith("out of memory in step 3 with 64 rows at once")


def test_a_row_that_does_not_fit_is_one_line(cache, tmp_path, monkeypatch) -> None:
    Device(monkeypatch, n_rows=0)
    given = {**SETTINGS, "cache": cache, "hook": "a", "type": "topk", "k": 4}
    with pytest.raises(
        MemoryLimitError, match=r"out of memory on cpu: the run needs about [\d.]+ KiB, [\d.]+ .iB are "
    ):
        train_sae(**given, runs_dir=str(tmp_path))


def test_out_of_memory_elsewhere_is_one_line(cache, tmp_path, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("stub")

    monkeypatch.setattr("sae_granary.train.trainer.evaluate", fail)
    given = {**SETTINGS, "cache": cache, "hook": "a", "type": "topk", "k": 4}
    with pytest.raises(MemoryLimitError, match=r"free memory, then run: sae-train resume \S+; or train with a smaller"):
        train_sae(**given, runs_dir=str(tmp_path))


@pytest.mark.parametrize("name", registry.names())
def test_the_parameters_of_all_types_are_counted(name, cache) -> None:
    config = RunData.open(make_config([{**SETTINGS, "cache": cache, "type": name, "hook": hooks(name)}])).config
    n_bytes = sum(p.numel() * 4 for p in build_sae(config).parameters())
    assert capacity.parameter_bytes(config) == n_bytes


def hooks(name: str) -> list[str]:
    return ["a", "b"] if registry.get(name).reads.several else ["a"]


def test_a_small_gpu_is_named_with_what_fits_and_who_holds_it(cache, monkeypatch) -> None:
    data = RunData.open(make_config([{**SETTINGS, "cache": cache, "hook": "a", "type": "topk", "k": 4}]))
    data = data.with_config(replace(data.config, device="cuda"))
    needed = capacity.needed_memory(data.config)
    free = needed // 2 + capacity.stream_bytes([data])
    listed = f"GPU:0\nprocess {os.getpid()} uses 500.000 MB GPU memory\nprocess 4321 uses 2048.000 MB GPU memory"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 3 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**29)
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda device: listed)
    holder = r"\(2.5 GiB are held by other processes: process 4321: 2.0 GiB\)"
    expected = rf"of memory, cuda has \S+ KiB free of 3.0 GiB {holder}"
    with pytest.raises(ConfigError, match=expected + ": about d_sae=32 fits; or raise --grad-acc-steps"):
        capacity.check_capacity(data)
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda device: 1 / 0)
    with pytest.raises(ConfigError, match=r"held by other processes\): about"):
        capacity.check_capacity(data)
