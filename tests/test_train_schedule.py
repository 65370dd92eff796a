"""Schedules and derived defaults by hand."""

import pytest

from sae_granary.train.optim.schedule import Schedule, default_dead_after, default_lr, default_warmup


def test_linear_warms_up_stays_and_decays() -> None:
    schedule = Schedule(n_steps=100, kind="linear", warmup_steps=4, decay_fraction=0.2)
    assert [schedule.factor(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.factor(80) == 1.0
    assert schedule.factor(90) == pytest.approx(0.5)
    assert schedule.factor(99) == pytest.approx(0.05)


def test_cosine_is_halfway_in_the_middle_of_its_decay() -> None:
    schedule = Schedule(n_steps=100, kind="cosine", warmup_steps=0, decay_fraction=1.0, final=0.1)
    assert schedule.factor(0) == 1.0
    assert schedule.factor(50) == pytest.approx(0.55)
    assert schedule.factor(99) == pytest.approx(0.1, abs=1e-3)


def test_constant_never_decays_and_no_step_has_rate_0() -> None:
    assert [Schedule(10, "constant", 2).factor(s) for s in range(10)] == [0.5] + [1.0] * 9
    for kind in ("constant", "linear", "cosine"):
        for n in (1, 2, 3, 7):
            assert all(Schedule(n, kind, warmup_steps=n - 1, decay_fraction=1.0).factor(s) > 0 for s in range(n))


def test_derived_defaults() -> None:
    assert default_lr(2**14, 10_000) == 2e-4
    assert default_lr(2**12, 10_000) == 4e-4
    assert default_lr(2**14, 250) == pytest.approx(4e-4)
    assert default_lr(64, 10) == 1e-3
    assert (default_warmup(300), default_warmup(10**6)) == (15, 1000)
    assert default_dead_after(10**9, 4096) == 10**7
    assert default_dead_after(10**7, 4096) == 500_000
    assert default_dead_after(614_400, 2048) == 40_960  # 20 batches
    assert default_dead_after(10_000, 2048) == 10_000  # never longer than the run
