"""`--device-map` and `--load-in`: accelerate's placement gives the same rows, everywhere that loads the model again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from harvest_kit import build_model, config_of, texts

from sae_granary import open_cache
from sae_granary.analyze.encoding.text_rows import open_text_rows
from sae_granary.cache.errors import CacheMismatchError
from sae_granary.cache.load.origin import read_origin
from sae_granary.cache.read.verify import verify
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.ranks.world import World, in_blocks
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.harvest.replay.repair import repair
from sae_granary.harvest.run import harvest_activations
from sae_granary.models.config import WhereConfig
from sae_granary.models.device.placement import parse_device_map
from sae_granary.models.errors import ModelError
from sae_granary.models.language.splice import open_any

# A stand-in for two GPUs: modules on "disk" are placeholders that get their weights for their own forward pass only.
ON_DISK = json.dumps({"wte": "cpu", "wpe": "cpu", "h.0": "disk", "h.1": "disk", "h.2": "cpu", "ln_f": "disk"})


@pytest.fixture
def config(tmp_path: Path) -> HarvestConfig:
    (tmp_path / "corpus.txt").write_text("\n".join(texts(40)))
    model, hooks = build_model(tmp_path / "gpt2", "gpt2"), ("h.1.mlp.c_fc", "h.0.attn:in")
    sizes = {"ctx_len": 32, "batch_tokens": 256, "rows_per_shard": 256}
    return config_of(model, tmp_path / "corpus.txt", tmp_path / "plain", hooks=hooks, **sizes)


def placed(config: HarvestConfig, device_map: str) -> HarvestConfig:
    return replace(config, model=replace(config.model, device_map=device_map), out=config.out_path.with_name("placed"))


def test_a_placed_model_gives_the_same_rows_and_is_loaded_so_again(config: HarvestConfig) -> None:
    pytest.importorskip("accelerate", reason="an extra")
    harvest_activations(config, quiet=True)
    there = placed(config, ON_DISK)
    assert not harvest_activations(there, quiet=True).warnings
    plain, cache = open_cache(config.out_path), open_cache(there.out_path)
    assert cache.manifest.fingerprint["device_map"] == cache.manifest.model["device_map"] == parse_device_map(ON_DISK)
    assert "device_map" not in {**plain.manifest.fingerprint, **plain.manifest.model}
    assert [r.statistics for r in cache.records] == [r.statistics for r in plain.records]
    for name in plain.hook_points:
        for a, b in zip(plain.records, cache.records, strict=True):
            file = plain.manifest.layout.activations[name].shard_path(a.shard)
            assert a.files[file] == b.files[file]
    with pytest.raises(CacheMismatchError, match=r"device_map: the cache has '{.*wants 'auto'"):
        harvest_activations(placed(config, "auto"), quiet=True)
    with pytest.raises(CacheMismatchError, match="device_map"):
        harvest_activations(replace(there, out=config.out_path), quiet=True)

    added = add_hooks(there.out_path, WhereConfig(layers=(2,)), quiet=True)
    assert open_cache(added.path).manifest.model["device_map"] == parse_device_map(ON_DISK)
    file = there.out_path / cache.manifest.layout.activations["layer_1"].shard_path(1)
    file.write_bytes(file.read_bytes()[:-7])
    assert [damage.files for damage in repair(there.out_path, quiet=True)]
    assert verify(there.out_path).ok
    base = open_text_rows(cache, ["layer_1"], None, "cpu").model._base
    assert {parameter.device.type for parameter in base.parameters()} == {"cpu", "meta"}
    hooked = open_any(*read_origin(cache, "layer_1"))  # compares its rows with those that are stored
    assert hooked.model.lm_head.weight.device.type == "cpu"


def test_what_cannot_be_placed_is_refused_in_one_line(config: HarvestConfig) -> None:
    def refused(error: type[Exception], words: str, **model: object) -> None:
        with pytest.raises(error, match=words):
            harvest_activations(replace(config, model=replace(config.model, **model)), quiet=True)  # type: ignore[arg-type]
        assert not config.out_path.exists()

    refused(ModelError, "--load-in 4bit needs a GPU, and the device is cpu: leave it out", load_in="4bit")
    refused(ConfigError, "load_in='2bit': expected one of 8bit, 4bit", load_in="2bit")
    refused(ConfigError, "device_map='gpu': expected auto, balanced,", device_map="gpu")
    refused(ConfigError, 'device_map={"": 0: not valid JSON', device_map='{"": 0')
    refused(ConfigError, r"device_map={.*}: not valid JSON \(a key occurs twice\)", device_map='{"wte": 0, "wte": 1}')
    refused(ConfigError, "device_map={}: expected JSON that gives each module a device", device_map="{}")
    refused(ConfigError, "--compile needs the model on one device", device_map="auto", compile=True)
    where = WhereConfig(unit="text")
    with pytest.raises(ConfigError, match="leave out --device-map and --load-in"):
        harvest_activations(replace(placed(config, "cpu"), where=where), quiet=True)
    with pytest.raises(ConfigError, match="--device-map auto takes all GPUs of a machine, and 2 processes were"):
        in_blocks(placed(replace(config, block_docs=8), "auto"), World(0, 2, 0, 2))


def test_a_missing_package_or_another_device_is_named(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="an extra")
    with pytest.raises(ModelError, match=r"--device-map cuda:1 computes on cuda: add --device cuda"):
        harvest_activations(placed(config, "cuda:1"), quiet=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"--device-map auto needs accelerate: pip install 'sae-granary\[large\]'"):
        placed(config, "auto").model.placement.check("cpu")
    with pytest.raises(ModelError, match=r"--load-in 8bit needs bitsandbytes: pip install 'sae-granary\[quantized\]'"):
        replace(config.model, load_in="8bit").placement.check("cuda")


def test_a_device_map_is_written_in_one_way() -> None:
    assert parse_device_map({"h.1": 1, "h.0": "cuda:0"}) == '{"h.0": "cuda:0", "h.1": "cuda:1"}'
    assert parse_device_map('{"h.1": 1, "h.0": 0}') == parse_device_map({"h.0": 0, "h.1": 1})
    assert [parse_device_map(value) for value in ("auto", "1", 1, '{"": "cpu"}')] == ["auto", "cuda:1", "cuda:1", "cpu"]
