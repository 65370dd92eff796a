"""What a GPU does beside its model: casts and sums, bit for bit those of the CPU. Here the CPU does it the same way."""

import threading
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from fork_kit import LIMIT
from harvest_kit import CutOff, build_model, config_of, cut_off_after
from test_harvest_resume import assert_same_cache, write_corpus

from sae_granary import open_cache
from sae_granary.cache.errors import BadActivationError
from sae_granary.cache.format.layout import cache_layout
from sae_granary.cache.format.stats import block_sums
from sae_granary.cache.write import streams
from sae_granary.common.rows import HookPoint
from sae_granary.common.threads import THREADS
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.device import sums as device_sums
from sae_granary.harvest.device.host import HostCopier, Places
from sae_granary.harvest.device.sums import SumsOnDevice, same_sums
from sae_granary.harvest.progress import summary_rows
from sae_granary.harvest.run import cache_spec, harvest_activations
from sae_granary.models.tokens.contexts import WindowRules, make_window

WIDTHS = (1, 2, 7, 8, 9, 64, 127, 128, 129, 136, 257, 384, 513, 768, 770, 1000, 4096)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_device_adds_in_the_order_of_numpy(monkeypatch, width: int, dtype: str) -> None:
    monkeypatch.setattr(device_sums, "_SLICE_VALUES", 4000)  # several slices
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, width, generator=generator) * 10 ** (7 * torch.rand(70, width, generator=generator) - 4)
    x = x.to(getattr(torch, dtype))
    x[:, 0] = -0.0
    found = SumsOnDevice(x, range(3, 60, 16), 16).to_host()
    assert list(found) == [3, 19, 35, 51]
    exact = x.to(torch.float64).numpy()
    for first, sums in found.items():
        assert same_sums(sums, block_sums(exact[first : first + 16]))


@pytest.mark.parametrize(
    ("given", "stored"),
    [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16"), ("float16", "bfloat16")],
)
def test_the_device_rounds_as_numpy_does(given: str, stored: str) -> None:
    bits = torch.arange(0, 1 << 32, 65_521, dtype=torch.int64) if given == "float32" else torch.arange(1 << 16)
    values = bits.to(torch.int32 if given == "float32" else torch.int16).view(getattr(torch, given))
    values = values[values.isfinite()]
    numbers = values.to(torch.float32).numpy()
    with np.errstate(over="ignore"):
        expected = numbers.astype(ml_dtypes.bfloat16 if stored == "bfloat16" else np.float16).view(np.int16)
    assert np.array_equal(values.to(getattr(torch, stored)).view(torch.int16).numpy(), expected)


def copier(dtype: str = "float16", say=print) -> HostCopier:
    layout = cache_layout([HookPoint("a", "m", "output", 0, 8)], dtype, 64, inner_chunk_bytes=64)
    return HostCopier(torch.device("cpu"), layout, say, staged=True)


def test_rows_are_cast_and_blocks_of_whole_chunks_are_summed() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    host = copier()({"a": x}, [(2, 9, 3), (11, 19, 0)])  # chunks of 4 rows: the shard had 3, then a new one
    assert host.activations["a"].dtype == np.float16
    assert sorted(host.sums["a"]) == [3, 7, 11, 15, 19, 23]
    assert same_sums(host.sums["a"][7], block_sums(host.activations["a"][7:11]))


def test_a_value_beyond_the_stored_type_arrives_as_it_was() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    x[12, 3] = 70_000.0
    host = copier()({"a": x}, [(0, 30, 0)])
    assert host.activations["a"][12, 3] == 70_000.0
    assert not host.sums["a"]


def test_arrays_stay_while_two_more_are_copied() -> None:
    copy, xs = copier(), [torch.full((20 + i, 8), float(i)) for i in range(9)]
    hosts = []
    for i, x in enumerate(xs):
        hosts.append(copy({"a": x}, [(0, len(x), 0)]))
        for j in range(max(0, i - 2), i + 1):
            assert (hosts[j].activations["a"] == j).all()


def test_a_device_that_adds_in_another_order_is_not_believed(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(device_sums, "pairwise_sum", lambda x: x.flip(-1).cumsum(-1)[..., -1])
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) * 1e3
    copy = copier("float32", said.append)
    assert copy({"a": x}, [(0, 30, 0)]).sums == {}
    assert copy({"a": x}, [(0, 30, 0)]).sums == {}
    assert said == ["cpu does not add in the order of numpy: the CPU makes the statistics"]


def test_a_value_that_is_not_finite_is_left_to_the_writer() -> None:
    said: list[str] = []
    x = torch.full((30, 8), float("nan"))
    copier("float32", said.append)({"a": x}, [(0, 30, 0)])
    assert said == []


def test_places_are_those_of_the_writer() -> None:
    ids, rules = np.arange(7, dtype=np.int32), WindowRules(ctx_len=7)
    windows = [make_window(i, ids, ids, ids, (), rules) for i in range(4)]
    places = Places(20)
    assert places.parts(windows, 7) == [(7, 14, 0), (21, 7, 0)]  # 6 rows of the first shard stay empty
    assert places.parts(windows[:1], 0) == [(0, 7, 7)]
    full = Places(14)
    assert full.parts(windows[:2], 0) == [(0, 14, 0)]
    assert full.parts(windows[:1], 0) == [(0, 7, 0)]


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Inner chunks of 32 rows, so that buffers hold whole ones."""
    monkeypatch.setattr(
        "sae_granary.harvest.run.cache_spec",
        lambda prepared: replace(
            cache_spec(prepared), inner_chunk_bytes=32 * 32 * (1 if prepared.dtype == "int8" else 2)
        ),
    )


def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr("sae_granary.harvest.pipeline.STAGED", ("cpu",))
    monkeypatch.setattr("sae_granary.harvest.run.writing", lambda device: {"n_threads": 3})


def staged_config(folder: Path, dtype: str) -> HarvestConfig:
    model, corpus = build_model(folder / "model", "bert"), write_corpus(folder / "corpus.txt", 180)
    sizes = {"ctx_len": 16, "batch_tokens": 32, "rows_per_shard": 1024}  # sort buffers of 512 rows
    return config_of(model, corpus, folder / "whole", layers=(0, 1), dtype=dtype, **sizes)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_staged_harvest_is_the_same_also_when_it_is_cut(tmp_path: Path, monkeypatch, dtype: str) -> None:
    config, n_summed = staged_config(tmp_path, dtype), []
    monkeypatch.setattr(streams, "block_sums", lambda x: n_summed.append(len(x)) or block_sums(x))
    harvest_activations(config, quiet=True)
    n_alone = len(n_summed)
    as_on_a_gpu(monkeypatch)
    out = tmp_path / "cut"
    with pytest.raises(CutOff), cut_off_after(120):
        harvest_activations(replace(config, out=out), quiet=True)
    assert harvest_activations(replace(config, out=out), quiet=True).resumed_rows > 0
    assert_same_cache(out, config.out_path)
    n_summed.clear()
    result = harvest_activations(replace(config, out=tmp_path / "staged"), quiet=True)
    assert_same_cache(tmp_path / "staged", config.out_path)
    for thread in (thread for thread in threading.enumerate() if thread.name.startswith(THREADS)):
        thread.join(LIMIT)  # the one that tokenized ahead
        assert not thread.is_alive()
    assert {stage for stage, _ in result.busy} == {"tokenizer", "model", "copy", "write"}
    busiest = max(result.busy, key=lambda stage: stage[1])[0]
    assert dict(summary_rows(result))["limit"].startswith(f"{busiest} ")  # what a faster disk, or model, would help
    assert len(n_summed) == n_alone if dtype == "int8" else len(n_summed) < n_alone / 4
    assert open_cache(out).n_rows == result.n_rows


@pytest.mark.usefixtures("small_chunks")
def test_a_staged_harvest_names_the_value_that_it_cannot_store(tmp_path: Path, monkeypatch) -> None:
    config = staged_config(tmp_path, "float16")
    model = config.model.model
    from safetensors.torch import load_file, save_file

    weights = load_file(f"{model}/model.safetensors")
    name = next(name for name in weights if name.endswith("layer.0.output.LayerNorm.bias"))
    weights[name][5] = 1e5
    save_file(weights, f"{model}/model.safetensors", {"format": "pt"})
    as_on_a_gpu(monkeypatch)
    with pytest.raises(BadActivationError, match=r"layer_0.*99999.*out of the range of float16"):
        harvest_activations(config, quiet=True)
