"""A writer with several threads, or with sums that came with the rows: the bytes of one thread, and its errors."""

import ml_dtypes
import numpy as np
import pytest
from cache_kit import DTYPES, make_rows, toy_rows, toy_spec, tree

from sae_granary.cache.errors import BadActivationError
from sae_granary.cache.format.stats import block_sums
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.rows import BlockSums, Rows

D_IN = 40
N_ROWS, WINDOW, SIZE = 1280, 8, 32


def many_rows(dtype, hooks=("a", "b")) -> Rows:
    """Windows of 8 rows."""
    rng, i = np.random.default_rng(0), np.arange(N_ROWS)
    values = {hook: rng.normal(size=(N_ROWS, D_IN)).astype(dtype) for hook in hooks}
    return make_rows(values, token_id=i, doc_id=i // 64, window=i // WINDOW, position=i % 8, doc_position=i % 64)


def with_sums(rows: Rows, stored, size: int = SIZE, factor: float = 1.0) -> Rows:
    """Rows with the sums of every block of so many, at whatever row it starts."""
    sums = {}
    for hook, values in rows.activations.items():
        blocks = {i: block_sums(values[i : i + size].astype(stored)) for i in range(len(values) - size + 1)}
        sums[hook] = {i: BlockSums(factor * b.sum_D, b.square_D, b.square_N) for i, b in blocks.items()}
    return Rows(**(vars(rows) | {"sums": sums}))


def write(path, rows: Rows, dtype: str, step: int = 600, **how):
    """A cache of 512 rows per shard and 32 per inner chunk, written in parts that end in the middle of chunks."""
    sizes = {
        "d_in": D_IN,
        "rows_per_shard": 512,
        "inner_chunk_bytes": SIZE * D_IN * {"float32": 4, "int8": 1}.get(dtype, 2),
    }
    with CacheWriter.open(path, toy_spec(dtype, tuple(rows.activations), **sizes), **how) as writer:
        assert writer.layout.activations["a"].inner_rows == SIZE
        for start in range(0, rows.n_rows, step):
            writer.begin_buffer({"row": start})
            writer.append(rows[start : start + step])
        writer.finish({})
    return path


@pytest.mark.parametrize(
    ("given", "stored"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "float16"), ("float32", "int8")]
)
def test_threads_and_given_sums_change_no_byte(tmp_path, given, stored) -> None:
    rows = many_rows(DTYPES[given])
    expected = tree(write(tmp_path / "one", rows, stored))
    assert verify(tmp_path / "one").ok
    assert tree(write(tmp_path / "four", rows, stored, n_threads=4)) == expected
    if stored == "int8":  # sums are of the decoded rows
        return
    summed = with_sums(rows, DTYPES[stored])
    assert tree(write(tmp_path / "sums", summed, stored)) == expected
    assert tree(write(tmp_path / "both", summed, stored, n_threads=2)) == expected
    assert tree(write(tmp_path / "other_blocks", with_sums(rows, DTYPES[stored], SIZE - 1, 2.0), stored)) == expected


@pytest.mark.parametrize("how", [{}, {"n_threads": 3}, {"direct": True}])
def test_given_sums_are_what_is_recorded(tmp_path, how) -> None:
    rows = with_sums(many_rows(np.float32), np.float32, factor=2.0)
    assert tree(write(tmp_path / "a", rows, "float32", **how)) != tree(
        write(tmp_path / "b", many_rows(np.float32), "float32")
    )


@pytest.mark.parametrize(
    "how", [{}, {"n_threads": 3}, {"direct": True}, {"sums": True}, {"sums": True, "n_threads": 3}]
)
@pytest.mark.parametrize(("row", "value"), [(70, np.inf), (599, np.nan), (1030, 3.4e38)])
def test_the_value_that_cannot_be_stored_is_named(tmp_path, row, value, how) -> None:
    rows, how = many_rows(np.float32), dict(how)
    rows.activations["b"][row, 7] = rows.activations["b"][row + 5, 3] = value
    if how.pop("sums", False):
        rows = with_sums(rows, ml_dtypes.bfloat16)
    with pytest.raises(BadActivationError) as caught:
        write(tmp_path / "cache", rows, "bfloat16", **how)
    told = caught.value
    assert (told.hook, told.doc_id, told.row) == ("b", row // 64, row)
    assert np.array_equal(told.value, np.float32(value), equal_nan=True)


def test_what_a_thread_cannot_write_stops_the_writer(tmp_path) -> None:
    resource = pytest.importorskip("resource")
    before, rows = resource.getrlimit(resource.RLIMIT_FSIZE), many_rows(np.float32)
    write(tmp_path / "small", rows, "float32", n_threads=3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "cache", rows, "float32", n_threads=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "cache" / "commits").exists()


def test_rows_keep_their_sums_when_they_are_sliced() -> None:
    rows = with_sums(toy_rows(2), np.float32, 4)
    part = rows[3:11]
    assert sorted(part.sums["layer_1"]) == list(range(8))
    assert part.sums["layer_1"][0] is rows.sums["layer_1"][3]
