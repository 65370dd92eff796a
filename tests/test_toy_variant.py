"""A new variant is one file: with it in the folder of variants, every command knows it."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_kit import invoke
from safetensors.torch import load_file

from sae_granary import sae_core
from sae_granary.common.finished_run import read_summary
from sae_granary.sae_core import registry, variants
from sae_granary.train.cli import app
from sae_granary.train.config.merge import make_config, read_yaml

TOY = '''
"""Soft threshold: what exceeds a fixed threshold, shrunk by it."""

from dataclasses import dataclass

import torch
from command_kit import invoke

from sae_granary.sae_core.base import SAE
from sae_granary.sae_core.data import Activation
from sae_granary.sae_core.codes import Codes
from sae_granary.sae_core.options import PRE_ACTS, option
from sae_granary.sae_core.registry import register


@register("soft_threshold")
class SoftThresholdSAE(SAE):
    unit_decoder = True

    @dataclass(frozen=True)
    class Config(SAE.Config):
        shrink: float = option(0.5, help="what is taken off each pre-activation", ge=0, unit=PRE_ACTS)

    def activate(self, h):
        pre_acts = self.pre_acts(h)
        kept = pre_acts.support(self.config.shrink)
        values = torch.relu(self.encode_at(h, kept) - self.config.shrink)
        return Activation(Codes(values, kept.pattern), pre_acts)

    def penalties(self, out, progress):
        return {"l1": out.codes.values.sum() / out.codes.shape[0] / self.loss_scale.unit}
'''


@pytest.fixture
def _toy(tmp_path, monkeypatch):
    folder = tmp_path / "variants"
    folder.mkdir()
    (folder / "soft_threshold.py").write_text(TOY)
    monkeypatch.setattr(variants, "__path__", [*variants.__path__, str(folder)])
    monkeypatch.chdir(tmp_path)
    yield
    registry._VARIANTS.pop("soft_threshold", None)
    sys.modules.pop("sae_granary.sae_core.variants.soft_threshold", None)


@pytest.mark.usefixtures("_toy")
def test_the_commands_train_save_load_and_evaluate_a_variant_that_is_one_new_file(make_cache) -> None:
    make_cache()
    assert "soft_threshold" in invoke(app, "types").stdout
    assert "shrink" in invoke(app, "types", "soft_threshold").stdout
    flags = ["--cache", "toy", "--type", "soft_threshold", "--batch-size", "128", "--set", "shrink=0.2"]
    invoke(app, "run", *flags, "--steps", "200", "--save-every", "100", "--name", "toy")
    folder = Path("runs/toy")
    assert make_config([read_yaml(folder / "config.yaml")]).options["shrink"] == 0.2

    # evaluated: the summary's numbers are those of the SAE that was saved
    sae = sae_core.load(folder)
    assert type(sae).type_name == "soft_threshold"
    assert sae.config.shrink == pytest.approx(0.2, rel=0.5)  # rescaled with the pre-activations
    summary = read_summary(folder)
    assert 0 < summary["eval"]["fvu"] < 1
    assert 0 < summary["eval"]["l0"] < summary["d_sae"]
    assert "soft_threshold" in invoke(app, "compare", "runs/toy").stdout

    # resumed: what a checkpoint holds is the whole state
    whole = load_file(folder / "sae_weights.safetensors")
    (folder / "summary.json").unlink()
    [middle, end] = sorted((folder / "checkpoints").iterdir())
    assert (middle.name, end.name) == ("step_00000100", "step_00000200")
    shutil.rmtree(end)
    invoke(app, "resume", "runs/toy", "--quiet")
    again = load_file(folder / "sae_weights.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    # trained: longer is better
    invoke(app, "run", *flags, "--steps", "3", "--name", "short")
    assert summary["eval"]["fvu"] < read_summary(Path("runs/short"))["eval"]["fvu"]
