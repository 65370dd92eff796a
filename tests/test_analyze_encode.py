"""`sae-analyze encode`: codes on disk, equal to those of the SAE, resumable, refused where they do not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_kit import invoke, refused
from sae_kit import saved
from safetensors.torch import save_file

from sae_granary import sae_core
from sae_granary.analyze.cli import app
from sae_granary.analyze.encoding.blocks import stored_blocks
from sae_granary.analyze.encoding.codes import ARRAYS, check_arrays, open_codes
from sae_granary.analyze.encoding.encode import csr_of, encode_cache
from sae_granary.analyze.errors import DamagedCodesError, MismatchError
from sae_granary.analyze.source import open_source
from sae_granary.cache.opening import open_cache
from sae_granary.common.signed import write_signed
from sae_granary.sae_core import Codes, Pattern

D_SAE = 32


@pytest.fixture
def make_sae(tmp_path: Path):
    """The folder of an SAE with random weights."""

    def make(name="sae", type_name="topk", metadata=None, **options) -> Path:
        return saved(tmp_path / name, type_name, metadata=metadata, **{"d_sae": D_SAE, **options})

    return make


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_csr_is_sorted_without_zeros_and_sums_a_latent_that_a_row_holds_twice() -> None:
    indices = torch.tensor([[2, 0, 1], [3, 3, 0]])
    codes = Codes(torch.tensor([5.0, 1.0, 0.0, 2.0, 4.0, -1.0]), Pattern.fixed_k(indices, 4))
    block = csr_of(codes)
    assert block["counts"].tolist() == [2, 2]
    assert block["indices"].tolist() == [0, 2, 0, 3]
    assert block["values"].tolist() == [1.0, 5.0, -1.0, 6.0]
    full = csr_of(Codes(torch.tensor([[0.0, 7.0], [0.0, 0.0]]), Pattern(2, 2)))
    assert [full[name].tolist() for name in ("counts", "indices", "values")] == [[1, 0], [1], [7.0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("type_name", ["topk", "vanilla"])
def test_codes_are_those_of_the_sae_in_the_order_of_the_cache(make_cache, make_sae, dtype, type_name) -> None:
    cache, sae = make_cache(n_docs=20, rows_per_shard=300, dtype=dtype), make_sae(type_name=type_name)
    source = open_source(sae, cache, device="cpu")
    codes = encode_cache(source, source.place / "codes", block_rows=128)
    rows = open_cache(cache).hook("layer_3")[:]
    assert len(open_cache(cache).shards) > 1
    with torch.no_grad():
        expected = sae_core.load(sae).encode(rows).dense().numpy()
    assert codes.shape == expected.shape == (len(rows), D_SAE)
    np.testing.assert_allclose(codes.dense(), expected, rtol=1e-6, atol=1e-6)
    latents, values = codes.row(7)
    assert latents.tolist() == np.flatnonzero(expected[7]).tolist()
    np.testing.assert_allclose(values, expected[7][latents], rtol=1e-6)
    np.testing.assert_array_equal(codes.dense(5, 9), codes.dense()[5:9])
    with pytest.raises(IndexError, match="row -1 is out of range"):
        codes.row(-1)
    for name, kind in ARRAYS.items():  # plain files that NumPy alone reads
        assert np.load(codes.folder / f"{name}.npy").dtype == kind


def test_a_hook_point_without_rows_of_codes_gives_empty_rows(make_cache, make_sae) -> None:
    source = open_source(make_sae(type_name="vanilla"), make_cache(n_docs=3), device="cpu")
    with torch.no_grad():
        source.sae.encoder_bias.fill_(-1e6)
    codes = encode_cache(source, source.place / "codes")
    assert (len(codes.values), codes.dense().any()) == (0, False)


@pytest.mark.parametrize("kind", ["saelens", "sparsify"])
def test_folders_of_other_libraries_are_encoded(make_cache, tmp_path: Path, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    if kind == "saelens":
        cfg = {"architecture": "jumprelu", "d_in": 16, "d_sae": D_SAE, "dtype": "float32", "apply_b_dec_to_input": True}
        weights = {"W_enc": (16, D_SAE), "W_dec": (D_SAE, 16), "b_enc": (D_SAE,), "b_dec": (16,), "threshold": (D_SAE,)}
    else:
        cfg = {"activation": "topk", "d_in": 16, "num_latents": D_SAE, "k": 3, "normalize_decoder": True}
        weights = {"encoder.weight": (D_SAE, 16), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, 16), "b_dec": (16,)}
    tensors = {name: torch.rand(shape, generator=generator) - 0.5 for name, shape in weights.items()}
    if kind == "saelens":
        tensors["threshold"] = tensors["threshold"].abs()
    (tmp_path / kind).mkdir()
    (tmp_path / kind / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, tmp_path / kind / ("sae.safetensors" if kind == "sparsify" else "sae_weights.safetensors"))
    cache = make_cache(n_docs=10)
    invoke(app, "encode", tmp_path / kind, "--cache", cache, "--device", "cpu")
    [folder] = (tmp_path / kind / "analysis").glob("*/codes")
    x = torch.tensor(open_cache(cache).hook("layer_3")[:]) - tensors["b_dec"]
    if kind == "saelens":
        acts = x @ tensors["W_enc"] + tensors["b_enc"]
        expected = acts * (acts > tensors["threshold"])
    else:
        values, latents = (x @ tensors["encoder.weight"].t() + tensors["encoder.bias"]).relu().topk(3)
        expected = torch.zeros(len(x), D_SAE).scatter(1, latents, values)
    np.testing.assert_allclose(open_codes(folder).dense(), expected.numpy(), atol=1e-5)


class Killed(BaseException):
    pass


def test_a_killed_encoding_continues_to_the_same_bytes(make_cache, make_sae, tmp_path: Path) -> None:
    source = open_source(make_sae(), make_cache(n_docs=30), device="cpu")
    whole = encode_cache(source, tmp_path / "whole", block_rows=100)
    encoded: list[int] = []

    def die(n_rows: int) -> None:
        if n_rows >= 500:
            raise Killed

    with pytest.raises(Killed):
        encode_cache(source, tmp_path / "killed", block_rows=100, commit_blocks=2, tick=die)
    with pytest.raises(DamagedCodesError, match="400 rows are encoded and more are to come"):
        open_codes(tmp_path / "killed")
    with (tmp_path / "killed" / "values.npy").open("ab") as stream:
        stream.write(b"half a block")
    again = encode_cache(source, tmp_path / "killed", block_rows=100, tick=encoded.append)
    assert encoded[0] == 500  # what was committed is not encoded again
    assert bytes_of(again.folder) == bytes_of(whole.folder)
    encode_cache(source, again.folder, block_rows=100, tick=lambda n_rows: pytest.fail("encoded again"))


def test_what_does_not_fit_is_refused_in_one_line_with_both(make_cache, make_sae, tmp_path: Path) -> None:
    cache = make_cache()
    for folder, hooks, words in (
        (make_sae("wide", d_in=8), (), ["reads rows of width 8", "layer_3", "has width 16"]),
        (make_sae("hook", metadata={"hook_points": ["layer_5"]}), (), ["reads hook point 'layer_5'", "layer_3 (16)"]),
        (make_sae("two"), ("layer_3", "layer_3"), ["reads 1 hook points, got 2"]),
        (make_sae("model", metadata={"cache_fingerprint": {"model": "bert"}}), (), ["rows of bert", "rows of toy"]),
    ):
        with pytest.raises(MismatchError) as caught:
            open_source(folder, cache, hooks=hooks, device="cpu")
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_codes_of_another_sae_or_cache_are_refused_and_left_as_they_are(make_cache, make_sae, tmp_path: Path) -> None:
    first = open_source(make_sae(), make_cache(), device="cpu")
    codes = encode_cache(first, tmp_path / "codes")
    other = open_source(make_sae("other", k=5), make_cache("again"), device="cpu")
    before = bytes_of(codes.folder)
    for source, words in (
        (other, "belongs to another sae: "),
        (open_source(make_sae(), make_cache("seed", seed=1), device="cpu"), "cache: seed 0, expected seed 1"),
    ):
        with pytest.raises(MismatchError, match=f"{words}.*; remove the folder, or give another --out$"):
            encode_cache(source, codes.folder)
        with pytest.raises(MismatchError, match=f"{words}.*; remove the folder$"):
            open_codes(codes.folder, source.identity)
    assert bytes_of(codes.folder) == before
    with pytest.raises(MismatchError, match="expected an empty folder or codes"):
        encode_cache(first, first.folder)
    shutil.copytree(codes.folder, other.place / "codes")
    stats = refused(app, "stats", other.folder, "--cache", other.cache.path, "--device", "cpu")
    assert "belongs to another sae: " in stats
    assert stats.endswith("; remove the folder\n")  # stats has no --out


def test_damaged_codes_are_named(make_cache, make_sae, tmp_path: Path) -> None:
    codes = encode_cache(open_source(make_sae(), make_cache(), device="cpu"), tmp_path / "codes")
    cut = Path(shutil.copytree(codes.folder, tmp_path / "cut"))
    (cut / "values.npy").write_bytes((cut / "values.npy").read_bytes()[:-4])
    with pytest.raises(DamagedCodesError, match=r"values\.npy has .* bytes, expected"):
        open_codes(cut)
    record = codes.folder / "record.json"
    record.write_text(record.read_text().replace('"block_rows": 4096', '"block_rows": 4097'))
    with pytest.raises(DamagedCodesError, match="checksum"):
        open_codes(codes.folder)
    with pytest.raises(DamagedCodesError, match="holds no codes; `sae-analyze encode` writes them"):
        open_codes(tmp_path)


def test_rows_that_were_damaged_on_disk_are_named(make_cache, make_sae) -> None:
    source = open_source(make_sae(), make_cache(n_docs=5), device="cpu")
    with source.cache.shard_path("layer_3", 0).open("r+b") as stream:
        stream.seek(16 * 4 * 3)
        stream.write(np.float32("nan").tobytes())
    with pytest.raises(Exception, match="row 3 holds NaN or Inf"):
        source.encode(0, 10)


def test_the_command_writes_beside_the_sae_and_tells_errors_in_one_line(make_cache, make_sae, tmp_path: Path) -> None:
    cache, sae = make_cache(), make_sae()
    done = invoke(app, "encode", sae, "--cache", cache, "--device", "cpu")
    [folder] = (sae / "analysis").glob("*/codes")
    assert str(folder) in done.output
    assert "32 latents, L0 4.0" in done.output
    assert json.loads((folder / "record.json").read_text())["complete"] is True
    assert open_codes(folder).record == replace(open_codes(folder).record, nnz=4 * len(open_cache(cache)))
    refused(app, "encode", make_sae("wide", d_in=8), "--cache", cache, "--device", "cpu")
    assert not (tmp_path / "wide" / "analysis").exists()


@pytest.mark.parametrize(
    ("name", "with_checksums"), [("values", True), ("indptr", True), ("indices", True), ("indices", False)]
)
def test_altered_arrays_are_refused_in_one_line(make_cache, make_sae, name: str, with_checksums: bool) -> None:
    source = open_source(make_sae(), make_cache(), device="cpu")
    codes = encode_cache(source, source.place / "codes")
    if not with_checksums:  # as they were written before there were any
        body = {key: value for key, value in codes.record.to_json().items() if key != "arrays_xxh3"}
        write_signed(codes.folder / "record.json", body)
    check_arrays(open_codes(codes.folder))
    path = codes.folder / f"{name}.npy"
    data = bytearray(path.read_bytes())
    if name == "indices":
        data[-4:] = (2**31 - 1).to_bytes(4, "little")
    else:
        data[-5] ^= 1
    path.write_bytes(data)
    altered = open_codes(codes.folder)  # is lazy
    words = f"{path} {'is not what was written' if with_checksums else 'holds latent 2147483647, expected 0 to 31'}"
    with pytest.raises(DamagedCodesError):
        check_arrays(altered)
    if name == "indices":
        with pytest.raises(DamagedCodesError, match="holds latent 2147483647"):
            list(stored_blocks(altered, source.cache.column("doc_id"), source.cache.column("flags")))
    given = [str(source.folder), "--cache", str(source.cache.path), "--device", "cpu"]
    for command in (["stats"], ["encode", "--pool", "max"], ["encode", "--format", "npz"]):
        done = refused(app, *command, *given)
        assert words in done
        assert "remove the folder and run `sae-analyze encode` again" in done
    assert sorted(each.name for each in source.place.iterdir() if each.name[0] != ".") == ["codes"]
