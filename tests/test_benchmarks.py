"""The benchmarks in tiny sizes: that they run, and what they print."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from harvest_kit import build_model

from benchmarks import harvest_speed, loader_speed, step_speed, sweep, writer_speed
from benchmarks.apart import Contestant
from benchmarks.ragged import write_jsonl
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.models.config import ModelConfig, WhereConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _denormals_as_before() -> Iterator[None]:
    """Benchmarks set their process as a training does."""
    yield
    torch.set_flush_denormal(False)


def test_a_sweep_is_timed_beside_its_steps_alone(
    make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "GRID", {"type": ["topk", "batchtopk"], "k": [4]})
    monkeypatch.setattr(sweep, "BATCHED_GRID", {"type": ["topk"], "k": [4], "seed": [0, 1]})
    cache, size = make_cache(d_in=32), sweep.Size(d_sae=64, batch=128, steps=20)
    assert "Batched sweep: 2 SAEs of d_in 32" in sweep.tables(cache, 1000.0, size, "cpu", batched=True)
    table = sweep.tables(cache, 1000.0, size, "cpu")
    assert "2 SAEs of d_in 32, d_sae 64, batch 128, fp32, 20 steps" in table
    assert re.search(r"\| 2 steps alone \(limit\) +\| +\d+ +\| 1\.00", table), table
    assert re.search(r"\| one step of the sweep.* \| +\d+ +\| \d+\.\d\d", table), table


@pytest.mark.slow
def test_the_loader_is_timed_beside_a_copy() -> None:
    table = loader_speed.run(quick=True)
    assert re.search(r"\| shuffled batches, one epoch +\| +[\d.]+ +\| +\d+\.\d\d", table), table


@pytest.mark.slow
def test_the_steps_of_all_types_are_timed_beside_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"D_IN": 32, "D_SAE": 1024, "K": 4, "BATCH": 128, "TRAINED_L0": 8}.items():
        monkeypatch.setattr(step_speed, name, value)
    table = step_speed.run(quick=True)
    assert "encoder product (limit)" in table
    for name in step_speed.compared():
        assert re.search(rf"\| {name} +\| +\d+ ", table), table


def test_the_writer_is_timed_in_parts() -> None:
    table = writer_speed.tables(2048, (1, 2), 1)
    for name in ("write()", "XXH3-128", "2 threads, sums given, as by a GPU"):
        assert re.search(rf"\| {re.escape(name)} +\| [\d.]+", table), table


class OverError(Exception):
    """A contestant has taken its steps."""


def two_steps_each(contestants: Mapping[str, Contestant], repeats: int) -> dict[str, float]:
    """A race in this process."""
    steps = dict.fromkeys(contestants, -1)
    for name, contestant in contestants.items():

        def turn(took: float | None = None, name: str = name) -> None:
            steps[name] += 1
            if steps[name] == 2:
                raise OverError

        with suppress(OverError):
            contestant(turn)
    assert set(steps.values()) == {2}
    return dict.fromkeys(contestants, 1.0 + repeats)


def test_a_harvest_is_timed_beside_the_bare_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvest_speed, "keep_freed_memory", lambda *device: None)  # it holds for the whole process
    texts = TextConfig(str(write_jsonl(tmp_path / "texts.jsonl", 6)))
    config = HarvestConfig(ModelConfig(str(build_model(tmp_path / "model", "bert"))), WhereConfig(layers=(0,)), texts)
    table = harvest_speed.forward_table(config, "a tiny model", tmp_path, 1, config, two_steps_each)
    for name in (re.escape(harvest_speed.BARE), "harvest, checks and writing included", "harvest --compile"):
        assert re.search(rf"\| {name} +\| +\d+ +\| 1\.00 +\|", table), table
    table = harvest_speed.write_table(tmp_path, 512, 1)
    assert re.search(r"\| cache writer.* \| [\d.]+ +\| [\d.]+ +\|", table), table


SMALL = {"storage_sae": "--steps 10 --batch-size 64 --d-sae 64 --seeds 1"}
SMALL |= {"storage_sae step": "--table step --d-sae 64", "jumprelu_l0": "--steps 20 --batch-size 64 --d-sae 64"}
SMALL |= {"analyze": "--repeats 1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_others_print_a_table_for_a_tiny_cache(name: str, make_cache: Callable[..., Path]) -> None:
    module, options = f"benchmarks.{name.split()[0]}", SMALL[name].split()
    options += ["--targets", "4"] if "jumprelu" in name else []
    command = [sys.executable, "-m", module, "--cache", str(make_cache(d_in=32)), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\|-+\|", done.stdout, re.MULTILINE), done.stdout
