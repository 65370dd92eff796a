"""The table of docs/scale.md: a number of tokens by hand, and the page as the command prints it."""

from pathlib import Path

import pytest

from benchmarks.scale import PRICE, rows_of_table, scale

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


def test_bytes_shards_and_hours_by_hand() -> None:
    found = scale(2 * 262_144, 512 << 20)
    per_row = 768 * 2 + 4 + (4 + 8 + 8 + 4 + 4 + 1)  # activations, norm, columns
    assert found.shards == 2
    assert found.manifest_bytes == 2 * 1309
    assert found.counted_bytes == 9 * 2 * 262_144
    assert found.n_bytes == pytest.approx(2 * 262_144 * per_row, rel=1e-3)  # the rest are the sharding indices
    assert scale(738_000_000, 512 << 20).harvest_hours == pytest.approx(1.0)
    assert scale(2 * 262_144 + 1, 512 << 20).shards == 3


def test_the_page_has_the_table_that_the_command_prints() -> None:
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in PAGE.read_text().splitlines()]
    for row in rows_of_table(PRICE, 512 << 20):
        assert row in lines
