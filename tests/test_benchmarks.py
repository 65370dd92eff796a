"""The benchmarks in tiny sizes: that they run, and what they print."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import loader_speed, step_speed, sweep


def test_a_sweep_is_timed_beside_its_steps_alone(
    make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "GRID", {"type": ["topk", "batchtopk"], "k": [4]})
    table = sweep.tables(make_cache(d_in=32), 1000.0, sweep.Size(d_sae=64, batch=128, steps=20), "cpu")
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
