"""int8 through the commands: harvested, killed, described, trained on, spliced, encoded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_kit import invoke
from harvest_kit import CutOff, build_model, config_of, cut_off_after
from lm_kit import harvest as harvest_text
from lm_kit import trained_model
from sae_kit import saved
from test_harvest_resume import assert_same_cache, write_corpus

from sae_granary import encode_texts, harvest_activations, open_cache, train_sae
from sae_granary.analyze.encoding.encode import encode_cache
from sae_granary.analyze.source import open_source
from sae_granary.cache.cli import app
from sae_granary.cache.errors import StorageLossError
from sae_granary.cache.read.verify import verify
from sae_granary.common.errors import ConfigError
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.progress import summary_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> HarvestConfig:
    folder = tmp_path_factory.mktemp("int8")
    sizes = {"ctx_len": 16, "batch_tokens": 128, "rows_per_shard": 1024}
    model = build_model(folder / "model", "bert")
    return config_of(model, write_corpus(folder / "corpus.txt", 90), folder / "whole", dtype="int8", **sizes)


def test_a_harvest_in_int8_tells_what_it_lost_and_continues_to_equal_bytes(config: HarvestConfig, tmp_path) -> None:
    result = harvest_activations(config, quiet=True)
    [(hook, error)] = result.storage_errors
    assert (hook, 1e-6 < error.fvu < 1e-4) == ("layer_1", True)
    assert ("storage FVU", f"{error} (layer_1)") in summary_rows(result)
    assert harvest_activations(config, quiet=True).storage_errors == result.storage_errors  # complete already
    exact = harvest_activations(replace(config, out=tmp_path / "exact", dtype="float32"), quiet=True)
    a, b = (open_cache(path).hook("layer_1")[:].astype(np.float64) for path in (result.path, exact.path))
    assert error.fvu == pytest.approx(np.square(a - b).sum() / (b.var(0) * len(b)).sum(), rel=1e-3)
    for n_batches in (1, 12):
        out = tmp_path / str(n_batches)
        with cut_off_after(n_batches), pytest.raises(CutOff):
            harvest_activations(replace(config, out=out), quiet=True)
        harvest_activations(replace(config, out=out), quiet=True)
        assert_same_cache(out, result.path)


def test_info_tells_the_storage_error(config: HarvestConfig) -> None:
    path = harvest_activations(config, quiet=True).path
    shown = invoke(app, "info", path).stdout
    assert "storage FVU" in shown
    assert "format 2" in shown
    body = json.loads(invoke(app, "info", path, "--json").stdout)
    assert set(body["statistics"]["layer_1"]["storage_error"]) == {"fvu", "fvu_ordinary", "n_massive"}


def test_too_little_text_is_refused_with_the_remedy(config: HarvestConfig, tmp_path) -> None:
    few = replace(config, out=tmp_path / "few", max_tokens=50)
    with pytest.raises(StorageLossError, match=r"at least 256 at once: .* use --dtype bfloat16, or more text"):
        harvest_activations(few, quiet=True)
    assert not (tmp_path / "few").exists()
    with pytest.raises(ConfigError, match="expected one of auto, float32, float16, bfloat16, int8"):
        replace(config, dtype="int4")


def test_a_run_tells_it_too_and_warns_where_it_matters(config: HarvestConfig, tmp_path) -> None:
    path = harvest_activations(config, quiet=True).path
    settings = {"cache": str(path), "runs_dir": str(tmp_path), "type": "topk", "k": 4, "d_sae": 64, "device": "cpu"}
    run = train_sae(**settings, name="a", steps=20, batch_size=64)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["storage_error"]["layer_1"]["fvu"] < 1e-4
    assert not [note for note in summary["notes"] if "when they were stored" in note]
    assert [note for note in remarks_of(summary, fvu=5e-4) if "which the SAE's 0.0005 does not count" in note]


def remarks_of(summary, fvu):
    from sae_granary.train.result.notes import remarks

    changed = {**summary, "eval": {**summary["eval"], "fvu": fvu}}
    return remarks(changed, wanted_l0=None, warmup_steps=0)


def test_texts_are_encoded_as_their_harvest_was_stored(config: HarvestConfig, tmp_path) -> None:
    path = harvest_activations(config, quiet=True).path
    saved(tmp_path / "sae", d_in=32, d_sae=64, k=8)
    stored = encode_cache(open_source(tmp_path / "sae", path, device="cpu"), tmp_path / "codes").dense()
    lines = Path(config.text.dataset).read_text().split("\n")[:12]
    found = encode_texts(tmp_path / "sae", lines, cache=path, device="cpu").codes.dense().numpy()
    np.testing.assert_allclose(found, stored[: len(found)], atol=1e-4)


@pytest.mark.slow
def test_losses_through_a_language_model_take_the_decoded_rows(tmp_path) -> None:
    trained_model(tmp_path / "gpt2", "llama", 10)
    path = harvest_text(tmp_path / "gpt2", tmp_path / "cache", "--dtype", "int8")
    assert verify(path).ok
    settings = {"cache": str(path), "runs_dir": str(tmp_path), "type": "topk", "k": 4, "d_sae": 128, "device": "cpu"}
    run = train_sae(**settings, name="a", steps=12, batch_size=128, eval_downstream=True)
    assert np.isfinite(run.summary["eval"]["ce_score"])
