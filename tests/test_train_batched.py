"""SAEs of a sweep that share the passes over their latents: equal up to rounding, whoever shares them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from step_kit import N_ROWS, Launches, Waits, batch, count_reads, make_run
from test_train_resume import assert_same
from test_train_sweep import SETTINGS, Stopping

from sae_granary import resume_sweep, train_sweep
from sae_granary.sae_core import load
from sae_granary.train.errors import InterruptedRunError, RunExistsError
from sae_granary.train.loop import train_step
from sae_granary.train.memory.footprint import Footprint
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput
from sae_granary.train.sweeps import grouping
from sae_granary.train.sweeps.batched import _shape, _Stack
from sae_granary.train.sweeps.sweep import plan_sweep
from sae_granary.train.sweeps.sweep_plan import load_plan

NEVER_DEAD = {"dead_after_tokens": 10**9, "log_every": 100}


def runs_of(ks: Sequence[int], **settings) -> list[Run]:
    return [make_run("topk", k=k, init_seed=k, **NEVER_DEAD, **settings) for k in ks]


def step_together(runs: Sequence[Run], stack: _Stack, x: RowInput) -> list[bool]:
    """Whether each used what was prepared, and was accepted."""
    stack.prepare(x)
    prepared = [run.prepared is not None for run in runs]
    return [train_step(run, x).accepted and ok for run, ok in zip(runs, prepared, strict=True)]


def assert_close(ours: Run, theirs: Run) -> None:
    for key, value in theirs.sae.state_dict().items():
        torch.testing.assert_close(ours.sae.state_dict()[key], value, rtol=1e-4, atol=1e-5, equal_nan=True, msg=key)


@pytest.mark.parametrize("settings", [{}, {"loss": "mse", "grad_clip": 1e-3, "compute_dtype": "bfloat16"}])
def test_a_shared_pass_has_the_gradients_of_separate_ones(settings: dict) -> None:
    runs, alone = runs_of([3, 5, 2], **settings), runs_of([3, 5, 2], **settings)
    for run, other in zip(runs, alone, strict=True):
        train_step(run, batch("topk", 0))  # the first is measured
        train_step(other, batch("topk", 0))
        assert _shape(run) == _shape(runs[0]) is not None
    stack = _Stack(runs)
    for seed in range(1, 6):
        assert step_together(runs, stack, batch("topk", seed)) == [True] * 3
        for other in alone:
            train_step(other, batch("topk", seed))
    for run, other in zip(runs, alone, strict=True):
        assert_close(run, other)
        assert run.sae.num_tokens_since_fired.equal(other.sae.num_tokens_since_fired)


def test_the_bits_do_not_depend_on_who_shares_a_pass() -> None:
    together, apart = runs_of([3, 5, 2]), runs_of([3, 5, 2])
    stacks = [_Stack(together), *(_Stack([run]) for run in apart)]
    for seed in range(4):
        step_together(together, stacks[0], batch("topk", seed))
        for run, stack in zip(apart, stacks[1:], strict=True):
            step_together([run], stack, batch("topk", seed))
    for run, other in zip(together, apart, strict=True):
        assert all(torch.equal(value, other.sae.state_dict()[key]) for key, value in run.sae.named_parameters())


def test_a_device_is_waited_for_once_for_all_and_gets_fewer_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    runs, alone = runs_of(range(1, 9)), make_run("topk", **NEVER_DEAD)
    for run in (*runs, alone):
        for seed in range(2):
            train_step(run, batch("topk", seed))
    stack = _Stack(runs)
    assert step_together(runs, stack, batch("topk", 2)) == [True] * 8
    reads.clear()
    with Waits() as waits, Launches() as launches:
        assert step_together(runs, stack, batch("topk", 3)) == [True] * 8
    assert (len(reads), dict(waits.places)) == (1, {})
    with Launches() as of_one:
        train_step(alone, batch("topk", 3))
    assert launches.n < 0.68 * 8 * of_one.n


@pytest.mark.parametrize("on_device", [False, True])
def test_a_run_that_goes_wrong_takes_its_step_alone(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_device:
        count_reads(monkeypatch)
    runs, alone = runs_of([3, 2]), runs_of([3, 2])
    for one in (runs, alone):
        with torch.no_grad():
            one[0].sae.b_dec[0] = torch.nan
    stack, x = _Stack(runs), batch("topk", 1)
    assert step_together(runs, stack, x) == [False, True]
    assert [run.rejected for run in runs] == [1, 0]
    bad = batch("topk", 2)
    bad.rows["a"][3, 1] = torch.nan
    before = runs[1].sae.W_dec.detach().clone()
    assert step_together(runs, stack, bad) == [False, False]
    assert [run.rejected for run in runs] == [2, 1]
    assert runs[1].sae.W_dec.equal(before)
    train_step(alone[1], x)
    assert runs[1].sae.num_tokens_since_fired.equal(alone[1].sae.num_tokens_since_fired)


def test_other_steps_are_taken_alone() -> None:
    run = make_run("topk", dead_after_tokens=2 * N_ROWS, log_every=100)
    assert _shape(run) is None  # the first step is measured
    shapes = []
    for seed in range(4):
        train_step(run, batch("topk", seed))
        shapes.append(_shape(run))
    assert shapes[0] is not None
    assert run.sae.dead_mask.any()
    assert shapes[-1] is None  # AuxK
    for settings in ({"grad_acc_steps": 2}, {"loss": "nmse"}, {"multi_topk": True}):
        assert _shape(runs_of([3], **settings)[0]) is None
    assert _shape(make_run("batchtopk", **NEVER_DEAD)) is None


def test_out_of_memory_leaves_the_steps_to_each(make_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "steps": 6, "dead_after_tokens": 10**6}
    plain = train_sweep({"k": [2, 3]}, settings, runs_dir=str(tmp_path / "a"))

    def ask(stack: _Stack, parts: Sequence, n_rows: int) -> None:
        for run, *_ in parts:
            run.sae.num_tokens_since_fired.add_(5)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(_Stack, "_ask", ask)
    shared = train_sweep({"k": [2, 3]}, settings, batched=True, runs_dir=str(tmp_path / "b"))
    for row in plain.rows:
        assert_same(plain.folder / row["name"], shared.folder / row["name"])


def test_a_sweep_records_it_and_resumes_bitwise(make_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "dead_after_tokens": 10**6, "steps": 12}
    grid, sizes, prepare = {"type": ["topk", "vanilla"], "k": [2, 3], "lr": [1e-3]}, [], _Stack.prepare
    monkeypatch.setattr(_Stack, "prepare", lambda stack, x: sizes.append(len(stack._runs)) or prepare(stack, x))
    whole = train_sweep(grid, settings, batched=True, runs_dir=str(tmp_path / "a"))
    assert load_plan(whole.folder).batched
    assert set(sizes) == {2}
    assert len(sizes) == 8  # steps 1, 4, 8 and 12 are measured
    plain = train_sweep(grid, settings, runs_dir=str(tmp_path / "plain"))
    assert not load_plan(plain.folder).batched
    for row in whole.rows:
        ours, theirs = (load(folder / row["name"]) for folder in (whole.folder, plain.folder))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-4, equal_nan=True)
    reporter = Stopping(8)
    with pytest.raises(InterruptedRunError):
        train_sweep(
            grid, settings, batched=True, runs_dir=str(tmp_path / "b"), reporter=reporter, stop=reporter.sink.stop
        )
    stopped = tmp_path / "b" / whole.folder.name
    resume_sweep(stopped)
    for row in whole.rows:
        assert_same(whole.folder / row["name"], stopped / row["name"])
    with pytest.raises(RunExistsError, match="holds a sweep with other settings"):
        train_sweep(grid, settings, runs_dir=str(tmp_path / "b"))


def test_groups_have_room_for_the_gradients_of_all(monkeypatch: pytest.MonkeyPatch, make_cache, tmp_path: Path) -> None:
    asked: list[list[Footprint]] = []
    monkeypatch.setattr(grouping, "available_memory", lambda device: 2**33)
    fit = grouping.fit_groups
    monkeypatch.setattr(
        grouping, "fit_groups", lambda sized, usable: asked.append([size for _, size in sized]) or fit(sized, usable)
    )
    settings = {**SETTINGS, "cache": str(make_cache()), "type": "topk", "runs_dir": str(tmp_path)}
    for shared in (False, True):
        plan_sweep({"k": [2, 3]}, settings, batched=shared)
    apart, together = asked
    assert [(size.resident + size.step, 0) for size in apart] == [(size.resident, size.step) for size in together]
