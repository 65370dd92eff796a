# ruff: noqa: F811
"""Texts through an SAE that reads hook points of the harvest and added ones: codes are those of one harvest of all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_kit import invoke
from harvest_kit import WIDTH, texts
from sae_kit import saved
from test_harvest_extend import config, harvest, models  # noqa: F401

from sae_granary import encode_texts
from sae_granary.analyze.cli import app
from sae_granary.analyze.encoding.codes import open_codes
from sae_granary.harvest.config import HarvestConfig
from sae_granary.harvest.replay.add import add_hooks
from sae_granary.models.config import WhereConfig

ORDERS = (("layer_1", "layer_2"), ("layer_2", "layer_1"))


def caches_with_both(config: HarvestConfig, dtype: str) -> tuple[Path, Path]:
    """A cache of layer 1 to which layer 2 was added, and one that was harvested with both."""
    harvest(config, dtype=dtype)
    add_hooks(config.out_path, WhereConfig(layers=(2,)), quiet=True)
    both = config.out_path.with_name("both")
    harvest(replace(config, where=WhereConfig(layers=(1, 2)), out=both), dtype=dtype)
    return config.out_path, both


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_texts_are_encoded_at_original_and_added_hook_points_together(
    config: HarvestConfig, tmp_path: Path, dtype: str
) -> None:
    added, both = caches_with_both(config, dtype)
    given = texts(5, seed=3)
    for type_name in ("crosscoder", "route", "transcoder"):
        sae = saved(tmp_path / type_name, type_name, d_in=WIDTH, d_sae=64)
        for hooks in ORDERS:
            found, want = (encode_texts(sae, given, cache=c, hooks=hooks, device="cpu") for c in (added, both))
            assert found.tokens == want.tokens
            assert found.codes.indices.numel() > 0
            np.testing.assert_array_equal(found.codes.dense().numpy(), want.codes.dense().numpy())


def test_the_commands_read_original_and_added_hook_points_together(config: HarvestConfig, tmp_path: Path) -> None:
    added, both = caches_with_both(config, "float32")
    sae = saved(tmp_path / "crosscoder", "crosscoder", d_in=WIDTH, d_sae=64)
    output = {}
    for name, cache in (("added", added), ("both", both)):
        flags = [str(sae), "--cache", str(cache), "--device", "cpu", "--hook", "layer_1,layer_2"]
        shown = invoke(app, "show", *flags, "--text", "the quick brown fox")
        out = str(tmp_path / f"of_{name}")
        invoke(app, "encode", *flags, "--text", "rain falls on stone", "--out", out)
        invoke(app, "encode", *flags, "--pool", "max", "--format", "npz", "--out", f"{out}.npz")
        output[name] = shown.output, open_codes(out).dense(), np.load(f"{out}.npz")["data"]
    assert output["added"][0] == output["both"][0]
    for found, want in zip(output["added"][1:], output["both"][1:], strict=True):
        np.testing.assert_array_equal(found, want)
