"""The simulated harvest in blocks: small cases by hand."""

from pathlib import Path

import pytest

from benchmarks.harvest_simulation import Harvest, rows_of_table, simulate


def test_one_rank_does_block_after_block() -> None:
    found = simulate(Harvest(ranks=1, blocks=4, block=100, shard=10, claim=5))
    assert (found.seconds, found.wasted, found.failures) == (420, 0, 0)
    assert found.efficiency == pytest.approx(400 / 420)


def test_a_rank_without_a_block_waits() -> None:
    found = simulate(Harvest(ranks=2, blocks=3, block=100, shard=10))
    assert (found.seconds, found.efficiency) == (200, 0.75)


def test_a_slow_rank_takes_longer() -> None:
    found = simulate(Harvest(ranks=2, blocks=3, block=100, shard=10, slow_share=0.5, slow_factor=3))
    assert found.seconds == 300  # the slow one takes 0 to 300, the other one two blocks until 200


def test_the_block_of_a_failed_rank_is_continued_after_its_lease_and_its_last_shard() -> None:
    harvest = Harvest(ranks=1, blocks=2, block=100, shard=40, lease=120, restart=30)
    found = simulate(harvest, failures={0: [150]})
    # block 1 begins at 100; at 150 a shard of 40 is committed and 10 are lost; free at 270, 60 are left
    assert (found.seconds, found.wasted, found.failures) == (330, 10 / 200, 1)


def test_another_rank_takes_the_block_over() -> None:
    harvest = Harvest(ranks=2, blocks=2, block=100, shard=40, lease=60, restart=1000)
    found = simulate(harvest, failures={0: [90]})
    # rank 1 is done at 100 and waits until 150; 80 of block 0 are committed
    assert found.seconds == 170


def test_random_failures_repeat_with_the_seed_and_cost_time() -> None:
    harvest = Harvest(ranks=8, blocks=64, block=600, shard=60, between_failures=3600)
    assert simulate(harvest, seed=1) == simulate(harvest, seed=1) != simulate(harvest, seed=2)
    assert simulate(harvest, seed=1).failures > 0
    assert simulate(harvest, seed=1).efficiency < simulate(Harvest(8, 64, 600, 60)).efficiency == 1


def test_the_page_has_the_table_that_the_command_prints() -> None:
    page = (Path(__file__).parents[1] / "docs" / "scale.md").read_text()
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines()]
    for row in rows_of_table(1e12, 500.0):
        assert row in lines
