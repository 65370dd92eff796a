"""One byte per value: the error bound, equal bits everywhere, what is refused, what is told."""

import base64
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from cache_kit import edit_signed, flip, make_rows, toy_rows, toy_spec, tree
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_granary import open_cache
from sae_granary.cache.errors import BadActivationError, CorruptCacheError, StorageLossError
from sae_granary.cache.format.affine import MAX_CODE, MAX_ERROR, MIN_STEP, STEP_BITS, Affine, round_up
from sae_granary.cache.format.documents import hash_file
from sae_granary.cache.format.stats import storage_error
from sae_granary.cache.load.decode import decode
from sae_granary.cache.load.loader import Batch, Loader, LoaderState
from sae_granary.cache.load.selection import Filters, Selection
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write.calibrate import fit, measure
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.rows import DocumentRow
from sae_granary.train.config.merge import make_config
from sae_granary.train.data.passes import sound_rows
from sae_granary.train.data.run_data import RunData

N_BUFFERS = 12
WORST = 2.0**-23  # relative: the subtraction of the offset and its addition each round once


def write(path, rows=None, dtype="int8", stop_after=None, **spec):
    """A cache of the toy rows in two buffers: 450 rows, and the rest."""
    rows = toy_rows(N_BUFFERS) if rows is None else rows
    starts = np.flatnonzero(rows.position == 0)
    cut = int(starts[np.searchsorted(starts, 450)]) if rows.n_rows > 500 else rows.n_rows
    with CacheWriter.open(path, toy_spec(dtype, rows_per_shard=96, **spec)) as writer:
        cursor = writer.cursor
        for number, part in enumerate((rows[:cut], rows[cut:])):
            if cursor is not None and number < cursor.source["buffer"]:
                continue
            done = cursor.rows_into_buffer if cursor is not None and number == cursor.source["buffer"] else 0
            writer.begin_buffer({"buffer": number})
            writer.skip(done)
            if done < part.n_rows:
                part = part[done:]
                ids = dict.fromkeys(part.doc_id.tolist())
                writer.append(part, [DocumentRow(i, "toy.txt", i, f"document {i}") for i in ids])
            if stop_after == number:
                raise KeyboardInterrupt
        writer.finish({"rows": rows.n_rows})
        return writer.warnings


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "toy"
    write(path)
    return open_cache(path)


def affines(d_in):
    """Any that the format allows; a subnormal offset, which flushing would change, it does not."""
    steps = st.lists(st.floats(-96, 90), min_size=d_in, max_size=d_in)
    offset = st.floats(-1e6, 1e6, width=32).map(lambda value: value if abs(value) >= MIN_STEP else 0.0)

    def make(steps, offsets):
        return Affine(round_up(np.exp2(steps).astype(np.float32), STEP_BITS), np.array(offsets, np.float32))

    return st.builds(make, steps, st.lists(offset, min_size=d_in, max_size=d_in))


@settings(max_examples=150, deadline=None)
@given(affine=affines(5), seed=st.integers(0, 2**32 - 1), spread=st.floats(-20, 28), tail=st.floats(0, 6))
def test_the_error_stays_below_the_bound(affine, seed, spread, tail):
    """|x - decoded| <= step scale (|q| + 16.75), up to the rounding of float32 at the offset."""
    z = np.random.default_rng(seed).normal(size=(9, 5))
    z = np.sign(z) * np.abs(z) ** (1 + tail) * 2.0**spread
    z = np.clip(z, -1e9, 1e9)
    x = (z * affine.step_D.astype(np.float64) + affine.offset_D).astype(np.float32)
    codes, scales = np.empty(x.shape, np.int8), np.empty(len(x), np.float16)
    assert affine.encode(x, codes, scales) is None
    assert np.abs(codes.astype(int)).max() <= MAX_CODE
    error = np.abs(affine.decode(codes, scales).astype(np.float64) - x)
    slope = affine.step_D.astype(np.float64) * scales.astype(np.float64)[:, None]
    rounding = WORST * (np.abs(x.astype(np.float64)) + np.abs(affine.offset_D) + np.abs(x - affine.offset_D))
    assert (error <= slope * (np.abs(codes.astype(np.float64)) + MAX_ERROR) + rounding).all()


@settings(max_examples=150, deadline=None)
@given(affine=affines(7), seed=st.integers(0, 2**32 - 1), flush=st.booleans())
def test_numpy_torch_and_any_order_of_products_give_equal_bits(affine, seed, flush):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-MAX_CODE, MAX_CODE + 1, (13, 7)).astype(np.int8)
    scales = round_up(np.exp2(rng.uniform(-18, 15.9, 13)).astype(np.float32), 6).astype(np.float16)
    expected = affine.decode(codes, scales)
    tensors = (torch.from_numpy(codes), torch.from_numpy(scales)[:, None])
    vectors = (torch.from_numpy(affine.step_D), torch.from_numpy(affine.offset_D))
    torch.set_flush_denormal(flush)
    try:
        found = decode(*tensors, *vectors, torch.empty(13, 7))
    finally:
        torch.set_flush_denormal(False)
    assert found.numpy().tobytes() == expected.tobytes()
    q, s = codes.astype(np.float32), scales.astype(np.float32)[:, None]
    exact = q.astype(np.float64) * (np.abs(q) + 32) * s * affine.step_D.astype(np.float64) + affine.offset_D
    assert (exact.astype(np.float32) == expected).all()
    assert ((q * (np.abs(q) + 32)) * (s * affine.step_D) + affine.offset_D == expected).all()


def test_a_cache_is_written_read_verified_and_loaded(opened):
    rows = toy_rows(N_BUFFERS)
    assert opened.dtype == "int8"
    assert opened.manifest.version == 2
    assert verify(opened.path).ok
    for hook in opened.hook_points:
        stored, exact = opened.hook(hook)[:], rows.activations[hook]
        assert stored.dtype == np.float32
        fvu = ((stored - exact.astype(np.float64)) ** 2).sum() / (exact.astype(np.float64).var(0) * len(exact)).sum()
        error = storage_error(opened.moments(hook))
        assert error.fvu == pytest.approx(fvu, rel=1e-3)
        assert 1e-6 < error.fvu < 1e-4
        np.testing.assert_allclose(opened.norms(hook)[:], np.linalg.norm(stored.astype(np.float64), axis=1), rtol=1e-6)
        index = np.array([5, 700, 3, 5])
        assert (opened.hook(hook)[index] == stored[index]).all()
        assert (opened.hook(hook)[95:99] == stored[95:99]).all()  # over the end of a shard
        assert (opened.hook(hook)[-1] == stored[-1]).all()
        assert opened.hook(hook)[3:3].shape == (0, 8)
        assert (np.concatenate([opened.hook(hook).shard(i) for i in range(len(opened.shards))]) == stored).all()


@pytest.mark.parametrize("previous", [False, True])
def test_the_loader_delivers_the_decoded_rows(opened, previous):
    selection = Selection(filters=Filters(min_position=1)) if previous else Selection(part="all")
    options = {"batch_size": 48, "epochs": 1, "with_rows": True, "selection": selection, "previous": previous}
    seen = 0
    with Loader(opened, **options) as loader:
        for batch in loader:
            rows = opened.ordinals(batch.row_ids.numpy())
            for name, x in batch.x.items():
                hook, _, before = name.partition("@-")
                assert x.dtype == torch.float32
                assert x.numpy().tobytes() == opened.hook(hook)[rows - len(before)].tobytes()
            seen += batch.n_rows
        assert seen == loader.n_rows


def test_foreign_readers_decode_by_the_formula_in_the_attributes(opened):
    stored = opened.hook("layer_1")[:]
    present = opened.row_ids(np.arange(len(opened)))
    group = zarr.open_group(opened.path, mode="r")
    told = dict(group["activations/layer_1"].attrs)
    assert group.attrs["version"] == 2

    def by_tensorstore(path):
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(opened.path / path)}}
        return tensorstore.open(store, read=True).result().read().result()

    for read in (lambda path: group[path][:], by_tensorstore):
        q = read("activations/layer_1").astype(np.float32)
        names = {"q": q, "abs": np.abs, "scale": read(told["scale"]).astype(np.float32)[:, None]}
        names |= {"step": read(told["step"]), "offset": read(told["offset"])}
        formula = told["formula"].removeprefix("x[i, j] = ").partition(",  q")[0].partition(", q =")[0]
        values = eval(formula.replace("[i]", "").replace("[j]", ""), {}, names)
        assert values[present].tobytes() == stored.tobytes()
        absent = np.ones(len(values), bool)
        absent[present] = False
        assert absent.any()
        assert np.isnan(values[absent]).all()


@pytest.mark.parametrize("kind", ["constant", "varying"])
def test_massive_dimensions_do_not_cost_the_others(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4096, 96)).astype(np.float32)
    sign = rng.choice([-1, 1], (4096, 3)) if kind == "varying" else np.array([1, -1, 1])
    x[:, [3, 40, 77]] = 800 * sign + rng.normal(size=(4096, 3))
    error = measure(x, fit(x))
    assert error.n_massive == 3
    assert error.fvu_ordinary < 1e-4
    plain = np.rint(x / np.abs(x).max(1, keepdims=True) * 127) * np.abs(x).max(1, keepdims=True) / 127  # int8 per row
    others = np.delete(np.arange(96), [3, 40, 77])
    assert ((plain - x)[:, others] ** 2).sum() > 0.5 * (x[:, others].var(0) * 4096).sum()


def test_zeros_stay_zeros_where_a_dimension_has_many():
    x = np.maximum(np.random.default_rng(1).normal(size=(2048, 16)), 0).astype(np.float32)
    stored = fit(x).rounded(x)
    assert (stored[x == 0] == 0).all()


def test_a_killed_harvest_continues_to_equal_bytes(opened, tmp_path):
    """Before the first shard steps and offsets are fitted again; afterwards they are read back."""
    for stop_after in (0, 1):
        path = tmp_path / str(stop_after)
        with pytest.raises(KeyboardInterrupt):
            write(path, stop_after=stop_after)
        assert verify(path).ok
        assert (open_cache(path, allow_incomplete=True).hook("layer_1")[:5] == opened.hook("layer_1")[:5]).all()
        write(path)
        assert tree(path) == tree(opened.path)


def test_what_would_lose_too_much_is_refused_before_anything_is_written(tmp_path):
    rows = toy_rows(N_BUFFERS)
    for values in rows.activations.values():
        values[::20, 3] = 1e6  # a dimension that is massive on a twentieth of the rows
    with pytest.raises(StorageLossError, match=r"'layer_1': int8 loses too much: storage FVU .*use --dtype bfloat16"):
        write(tmp_path / "lossy", rows)
    assert not (tmp_path / "lossy").exists()
    with pytest.raises(StorageLossError, match=r"at least 256 at once: there are [0-9]+; use --dtype bfloat16"):
        write(tmp_path / "few", toy_rows(2))
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize(("value", "message"), [
    (np.nan, "value nan; check the model's compute dtype"),
    (-np.inf, "value -inf; check the model's compute dtype"),
    (3e12, r"is out of the range of int8; store a wider dtype \(--dtype bfloat16 or float32\)"),
])  # fmt: skip
def test_a_value_that_cannot_be_stored_is_named(tmp_path, value, message):
    for row in (7, 600) if not np.isfinite(value) else (600,):  # among those that are fitted to, and behind
        rows = toy_rows(N_BUFFERS)
        rows.activations["layer_3"][row, 2] = value
        with pytest.raises(BadActivationError, match=message) as caught:
            write(tmp_path / str(row), rows)
        assert (caught.value.hook, caught.value.doc_id) == ("layer_3", rows.doc_id[row])


def test_drift_is_told(tmp_path):
    rows = toy_rows(N_BUFFERS)
    for values in rows.activations.values():
        values[500::10, 3] = 3e4
    warnings = write(tmp_path / "drift", rows)
    assert warnings
    assert "shard" in warnings[0]
    assert "its rows are unlike the first ones: use --dtype bfloat16" in warnings[0]


def vector(values):
    return base64.b64encode(np.array(values, "<f4").tobytes()).decode()


@pytest.mark.parametrize(("member", "values", "message"), [
    ("step", [0] * 8, "step is 0.0, expected 7.89e-31 to 7.92e.28 with 3 significant bits"),
    ("step", [np.nan] * 8, "step is nan"),
    ("step", [np.inf] * 8, "step is inf"),
    ("step", [-1] * 8, "step is -1.0"),
    ("step", [1.1] * 8, "step is 1.1.* with 3 significant bits"),
    ("step", [1] * 7, "affine is not that of the hook points|offset is '8 numbers', expected 7"),
    ("offset", [np.nan] * 8, "offset is nan"),
    ("offset", [3e38] * 8, r"offset is 3.*e\+38"),
    ("offset", [1e-40] * 8, "offset is .*, expected 0, or 7.89e-31 to"),
])  # fmt: skip
def test_hostile_steps_and_offsets_are_refused(opened, tmp_path, member, values, message):
    path = tmp_path / "hostile"
    shutil.copytree(opened.path, path)
    edit_signed(path / "manifest.json", lambda body: body["affine"]["layer_1"].update({member: vector(values)}))
    with pytest.raises(CorruptCacheError, match=message):
        open_cache(path)


def test_an_older_reader_refuses_by_number_and_a_version_must_be_that_of_the_dtype(opened, tmp_path):
    path = tmp_path / "relabeled"
    shutil.copytree(opened.path, path)
    assert b'"version": 2' in (path / "manifest.json").read_bytes()[:100]  # what version 1 said of it: see test_damage
    edit_signed(path / "manifest.json", lambda body: body.update(version=1))
    with pytest.raises(CorruptCacheError, match="version is 1, expected 2, by its dtype int8"):
        open_cache(path)
    for missing in ("affine", "statistics"):
        shutil.copy(opened.path / "manifest.json", path / "manifest.json")
        edit_signed(path / "manifest.json", lambda body, missing=missing: body.pop(missing))
        with pytest.raises(CorruptCacheError, match=missing):
            open_cache(path)
    shutil.copy(opened.path / "manifest.json", path / "manifest.json")
    edit_signed(path / "manifest.json", lambda body: body["statistics"]["layer_3"].pop("error"))
    with pytest.raises(CorruptCacheError, match="expected error with each"):
        open_cache(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0, 60000.0, 1.01])
def test_a_hostile_scale_is_never_trained_on_and_verify_names_it(opened, tmp_path, value):
    """The checksums are mended too: only what the numbers say is left to tell."""
    path = tmp_path / "scales"
    shutil.copytree(opened.path, path)
    name = "scales/layer_1/c.0"
    scales = np.memmap(path / name, "<f2", "r+", shape=(5,))
    scales[3] = value
    scales.flush()
    entry = {"bytes": (path / name).stat().st_size, "xxh3": hash_file(path / name).xxh3}
    edit_signed(path / "commits/00000000.json", lambda body: body["files"].update({name: entry}))
    record = {"bytes": (path / "commits/00000000.json").stat().st_size}
    record["xxh3"] = hash_file(path / "commits/00000000.json").xxh3

    def relist(body):
        body["shards"][0]["files"][name] = entry
        body["shards"][0]["record"] = record

    edit_signed(path / "manifest.json", relist)
    problems = [finding.problem for finding in verify(path).problems]
    assert problems == ["scales of layer_1 hold numbers that are never stored"]
    hostile = open_cache(path)
    config = {"cache": str(path), "hook": "layer_1", "type": "topk", "k": 2, "d_sae": 16, "batch_size": 32, "steps": 1}
    data = RunData.open(make_config([config]))
    part = np.arange(8)
    ids = torch.from_numpy(hostile.row_ids(part))
    batch = Batch({"layer_1": torch.from_numpy(hostile.hook("layer_1")[part])}, LoaderState(0), ids)
    assert len(sound_rows(data, batch)["layer_1"]) == 7


def test_a_changed_code_or_step_array_is_found_by_verify(opened, tmp_path):
    path = tmp_path / "flipped"
    for name, told in {"activations/layer_1/c.2.0": "checksum", "affine/layer_3/step/c.0": "checksum"}.items():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(opened.path, path)
        flip(path / name, 5)
        problems = verify(path).problems
        assert [finding.path for finding in problems] == [name]
        assert told in problems[0].problem


FROZEN = Path(__file__).parent / "data" / "format2_tiny" / "int8"
ROW_7 = [-0.06103515625, 168.9912109375, 2.5640931129455566, 0.0]


def write_frozen(path, **changes):
    """320 rows without chance: windows of eight, one dimension in units of a hundred, another mostly zero."""
    row = np.arange(320)
    x = ((row[:, None] * np.array([7, 11, 13, 17]) % 101 - 50) / 16).astype(np.float32)
    x[:, 1] *= 100
    x[:, 3] *= row % 5 == 0
    columns = {"token_id": row % 10, "doc_id": row // 40, "window": row // 8, "position": row % 8}
    rows = make_rows({"layer_1": x}, **columns, doc_position=row % 8, flags=np.where(row % 8 == 0, 3, 0))
    documents = [DocumentRow(i, "counting", i, f"document {i}") for i in range(8)]
    with CacheWriter.open(path, toy_spec("int8", ("layer_1",), 4, rows_per_shard=204, **changes)) as writer:
        writer.begin_buffer({"next_document": 0})
        writer.append(rows, documents)
        writer.finish({})
    return x


def test_a_cache_of_format_2_opens_forever_and_the_same_bytes_are_written(tmp_path):
    x = write_frozen(tmp_path / "today")
    frozen, today = open_cache(FROZEN), open_cache(tmp_path / "today")
    assert [(shard.index, shard.n_rows) for shard in frozen.shards] == [(0, 200), (1, 120)]
    assert verify(FROZEN).ok
    assert frozen.hook()[:].tobytes() == today.hook()[:].tobytes()
    np.testing.assert_allclose(frozen.hook()[:], x, atol=2, rtol=0.01)
    assert (frozen.hook()[:][x[:, 3] == 0, 3] == 0).all()
    assert frozen.hook()[7].tolist() == ROW_7
    for name in tree(FROZEN):
        if name.startswith(("activations", "scales", "affine", "rows")):
            assert tree(FROZEN)[name] == tree(tmp_path / "today")[name]


def test_a_cache_of_a_model_with_fewer_bits_has_format_4_and_the_same_rows(tmp_path):
    write_frozen(tmp_path / "bits", provenance={"model": {"id": "toy", "load_in": "8bit"}})
    opened = open_cache(tmp_path / "bits")
    assert (opened.manifest.version, opened.dtype, verify(tmp_path / "bits").ok) == (4, "int8", True)
    assert np.array_equal(opened.hook("layer_1")[:], open_cache(FROZEN).hook("layer_1")[:])
