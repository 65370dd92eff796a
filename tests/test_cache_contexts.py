"""Whole windows read back from the metadata: every token where the model saw it, seekable, split by document."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from cache_kit import make_rows
from command_kit import run_python
from conftest import write_cache

from sae_granary import open_cache
from sae_granary.cache.errors import SelectionError
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.load.context_order import ContextOrder
from sae_granary.cache.load.selection import Filters, Holdout, Selection
from sae_granary.cache.load.whole_contexts import Contexts, ContextsState, read_contexts
from sae_granary.cache.read.reader import Cache
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.rows import FLAG_SPECIAL, FLAG_WINDOW_START, DocumentRow, HookPoint, Rows

HALF = Holdout(0.5)
ALL = Selection(part="all")


@pytest.fixture
def opened(make_cache):
    return open_cache(make_cache())  # three shards


def pass_over(opened, **options) -> list[Contexts]:
    return list(read_contexts(opened, epochs=1, **({"batch_rows": 200} | options)))


def rows_of(batches, field="real") -> np.ndarray:
    return np.concatenate([b.row[getattr(b, field)] for b in batches])


def test_every_row_once_in_its_window(opened) -> None:
    batches = pass_over(opened, selection=ALL)
    assert len(opened.shards) > 1
    assert rows_of(batches).tolist() == list(range(len(opened)))
    windows = np.asarray(opened.column("window")[:])
    assert sum(map(len, batches)) == len(np.unique(windows))
    for batch in batches:
        for i in range(len(batch)):
            rows = batch.row[i][batch.real[i]]
            assert len(set(windows[rows])) == 1
            assert np.array_equal(opened.column("position")[rows], np.arange(len(rows)))
            assert np.array_equal(batch.token_id[i][batch.real[i]], opened.column("token_id")[rows])
            assert np.array_equal(batch.doc_id[i][batch.real[i]], opened.column("doc_id")[rows])
            assert np.array_equal(batch.special[i][batch.real[i]], (opened.column("flags")[rows] & FLAG_SPECIAL) != 0)
        assert not batch.keep[~batch.real].any()
        assert batch.real.any(0).all()  # no wider than its longest window


@pytest.mark.parametrize("filters", [Filters(), Filters(special=True, max_position=9), Filters(max_norm=5.0)])
def test_kept_rows_are_those_that_the_loader_delivers(opened, filters) -> None:
    columns = {name: np.asarray(opened.column(name)[:]) for name in ("flags", "position", "doc_id")}
    columns["norm:layer_3"] = np.asarray(opened.norms()[:])
    parts = {}
    for part in ("train", "heldout"):
        selection = Selection(filters.resolve(opened), HALF, part)
        used = {k: v for k, v in columns.items() if k.split(":")[0] in selection.columns}
        parts[part] = rows_of(pass_over(opened, selection=Selection(filters, HALF, part)), "keep")
        assert parts[part].tolist() == np.flatnonzero(selection.mask(used)).tolist()
        assert len(parts[part])
    documents = [set(opened.column("doc_id")[parts[part]]) for part in parts]
    assert not documents[0] & documents[1]


def test_batches_are_whole_windows_up_to_the_size(opened) -> None:
    sizes = [batch.n_rows for batch in pass_over(opened, selection=ALL)]
    assert max(sizes) <= 200
    assert min(sizes[:-1]) > 200 - 40  # no window is longer
    single = pass_over(opened, selection=ALL, batch_rows=1)
    assert {len(batch) for batch in single} == {1}


def same(a: Contexts, b: Contexts) -> bool:
    names = ("token_id", "real", "special", "doc_id", "keep", "row")
    return a.state == b.state and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("part", ["train", "heldout"])
def test_a_state_continues_exactly(opened, part, seed) -> None:
    options = {"batch_rows": 90, "selection": Selection(holdout=HALF, part=part), "seed": seed}
    one_pass = len(pass_over(opened, **options))
    whole = list(islice(read_contexts(opened, **options), 2 * one_pass + 3))
    assert {batch.state.epoch for batch in whole} == {0, 1, 2}
    for i in range(len(whole) - 1):
        rest = islice(read_contexts(opened, **options, state=whole[i].state), 2)
        assert all(same(a, b) for a, b in zip(rest, whole[i + 1 : i + 3], strict=False)), i


def test_a_seed_shuffles_whole_windows_in_each_epoch_anew(opened) -> None:
    plain = rows_of(pass_over(opened, selection=ALL))
    options = {"batch_rows": 200, "selection": ALL, "epochs": 2}
    orders = [rows_of(list(read_contexts(opened, **options, seed=seed))) for seed in (0, 1)]
    epochs = [part for order in orders for part in np.split(order, 2)]
    starts = np.asarray(opened.column("position")[:]) == 0
    n_windows = int(starts.sum())
    number = np.cumsum(starts)
    for i, rows in enumerate(epochs):
        assert np.array_equal(np.sort(rows), plain)  # every row of every window once
        assert np.count_nonzero(np.diff(number[rows])) == n_windows - 1  # no window is torn
        assert np.mean(np.diff(rows) == 1) < 1 - 0.9 * n_windows / len(rows)  # and few follow as harvested
        assert not any(np.array_equal(rows, other) for other in epochs[:i])


@pytest.mark.parametrize(("block_rows", "pool_blocks"), [(1, 7), (8, 3), (64, 1), (10_000, 1)])
@pytest.mark.parametrize("seed", [None, 5])
def test_small_pools_deliver_every_window_once_from_any_cursor(opened, block_rows, pool_blocks, seed) -> None:
    selection = Selection(Filters().resolve(opened), HALF, "train")
    order = ContextOrder(opened, ("layer_3",), selection, seed, block_rows=block_rows, pool_blocks=pool_blocks)
    passes = [list(order.contexts(epoch, 0)) for epoch in (0, 1)]
    wanted = sorted(window[:3] for window in ContextOrder(opened, ("layer_3",), selection, None).contexts(0, 0))
    assert [sorted(window[:3] for window in one) for one in passes] == [wanted, wanted]
    assert (passes[0] == passes[1]) is False
    assert ([w[:3] for w in passes[0]] == [w[:3] for w in passes[1]]) is (seed is None)
    for i in range(0, len(passes[0]) - 1, 9):
        assert list(order.contexts(*passes[0][i][-1])) == passes[0][i + 1 :]


def test_split_keeps_order_and_trims(opened) -> None:
    batch = pass_over(opened, selection=ALL)[0]
    parts = list(batch.split(3))
    assert len(parts) == 3
    assert np.array_equal(rows_of(parts), rows_of([batch]))
    assert all(part.real.any(0).all() for part in parts)
    assert len(list(batch.split(10_000))) == len(batch)


def toy_rows(tokens: list[list[tuple[int, int]]]) -> Rows:
    """Windows of (doc_id, flags) per token."""
    flat = [(w, p, *token) for w, window in enumerate(tokens) for p, token in enumerate(window)]
    window, position, doc_id, flags = (np.array(column) for column in zip(*flat, strict=True))
    n = len(flat)
    values = np.arange(1.0, 2 * n + 1, dtype=np.float32).reshape(n, 2)
    columns = {"token_id": np.arange(10, 10 + n), "doc_id": doc_id, "window": window, "position": position}
    return make_rows({"layer_0": values}, **columns, flags=flags)


def write(path: Path, rows: Rows, unit: str = "token") -> Cache:
    spec = CacheSpec(unit, (HookPoint("layer_0", "h.0", "output", 0, 2),), "float32", 64, {}, {"model": "toy"})
    with CacheWriter.open(path, spec) as writer:
        writer.begin_buffer({})
        ids = sorted(set(rows.doc_id.tolist()))
        writer.append(rows, [DocumentRow(i, "toy", i, f"document {i}") for i in ids])
        writer.finish({})
    return open_cache(path)


def test_documents_packed_in_one_window_keep_their_part(tmp_path) -> None:
    start = FLAG_WINDOW_START
    opened = write(tmp_path / "c", toy_rows([[(0, start), (0, 0), (1, 0), (2, 0)], [(2, start), (2, 0), (3, 0)]]))
    heldout = HALF.mask(np.arange(4))
    assert set(heldout) == {True, False}
    for part, wanted in (("train", ~heldout), ("heldout", heldout)):
        for batch in pass_over(opened, selection=Selection(holdout=HALF, part=part)):
            assert batch.keep[batch.real].tolist() == wanted[batch.doc_id[batch.real]].tolist()
            assert batch.keep.any(1).all()  # a window without a kept row is stepped over
            assert batch.real.sum(1).tolist() in ([4], [3], [4, 3])  # the others stay whole


def test_refusals(tmp_path, opened) -> None:
    texts = write(tmp_path / "texts", toy_rows([[(0, 0)], [(1, 0)]]), unit="text")
    with pytest.raises(SelectionError, match="one row per text, no contexts of tokens: harvest with --unit token"):
        read_contexts(texts, batch_rows=10)
    rows = toy_rows([[(0, 0)] * 4])
    rows.position[:] = [0, 1, 3, 4]
    cut = write(tmp_path / "cut", rows)
    with pytest.raises(SelectionError, match="shard 0 does not hold whole contexts"):
        next(iter(read_contexts(cut, batch_rows=10)))
    for part, message in (
        ("heldout", r"heldout part left \(0 of the .* by seed 0\); hold out more documents, .* or read part='train'"),
        ("train", r"train part left \(0 of the documents .* loosen the filters, or hold out fewer documents"),
    ):
        selection = Selection(Filters(min_position=10_000), Holdout(0.0), part)
        with pytest.raises(SelectionError, match=message):
            next(iter(read_contexts(opened, batch_rows=10, selection=selection)))
    with pytest.raises(SelectionError, match="0 rows, expected at least 1"):
        read_contexts(opened, batch_rows=0)
    assert ContextsState() == ContextsState(0, 0)


def test_windows_need_no_torch(tmp_path) -> None:
    path = write_cache(tmp_path / "c", n_docs=3)
    code = (
        "import sys\nfrom sae_granary import open_cache\n"
        "from sae_granary.cache.load.whole_contexts import read_contexts\n"
        f"print(len(next(read_contexts(open_cache({str(path)!r}), batch_rows=9))), 'torch' in sys.modules)"
    )
    assert run_python(code).stdout.split()[1] == "False"
