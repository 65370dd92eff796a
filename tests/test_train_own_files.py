"""A finished run loads its own files again: no variant can save another SAE than it trained, and say nothing."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch
from command_kit import refused

from sae_granary import resume_sweep, resume_training, sae_core, train_sae, train_sweep
from sae_granary.common.finished_run import SAE_FILES, SUMMARY, NotARunError, read_summary
from sae_granary.sae_core import Codes, registry
from sae_granary.sae_core.variants.topk import TopKSAE
from sae_granary.train.cli import app
from sae_granary.train.errors import FilesDifferError
from sae_granary.train.result.own_files import difference
from sae_granary.train.state.checkpoint import list_checkpoints

SETTINGS = {"d_sae": 32, "batch_size": 128, "steps": 20, "eval_rows": 300, "k": 4, "device": "cpu"}


@pytest.fixture
def _wrong_variant():
    """A variant that anyone might write: with a constant in units of pre-activations that is no option."""

    @registry.register("shifted_topk")
    class ShiftedTopK(TopKSAE):
        def activate(self, h):
            found = super().activate(h)
            return replace(found, codes=Codes(torch.relu(found.codes.values - 0.5), found.codes.pattern))

    yield
    registry._VARIANTS.pop("shifted_topk")


@pytest.mark.usefixtures("_wrong_variant")
def test_files_that_give_another_sae_are_an_error_with_both_numbers(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "name": "run", "runs_dir": str(tmp_path), "save_every": 10}
    message = (
        r"the files of this shifted_topk SAE give another SAE than was trained: FVU 0\.\d+ trained, 0\.\d+ from the "
        r"files, rows differ by .* of their norm .*sae-train resume .*run"
    )
    with pytest.raises(FilesDifferError, match=message) as first:
        train_sae(**settings, type="shifted_topk")
    folder = tmp_path / "run"
    assert not [name for name in (*SAE_FILES, SUMMARY) if (folder / name).exists()]
    with pytest.raises(NotARunError, match="sae-train resume"):
        read_summary(folder)
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000010", "step_00000020"]
    assert sae_core.load_native(list_checkpoints(folder)[-1] / "sae").type_name == "shifted_topk"
    with pytest.raises(FilesDifferError) as again:
        resume_training(folder)
    assert str(again.value) == str(first.value)
    assert "give another SAE" in refused(app, "resume", folder, "--quiet")
    # What folding rescales is the normalization: without one the constant means the same in the files.
    train_sae(**{**settings, "name": "plain"}, type="shifted_topk", normalize="none")


@pytest.mark.usefixtures("_wrong_variant")
def test_in_a_sweep_only_the_wrong_variant_has_no_result(make_cache, tmp_path) -> None:
    grid = {"type": ["topk", "shifted_topk", "batchtopk"]}
    result = train_sweep(grid, {**SETTINGS, "cache": str(make_cache())}, runs_dir=str(tmp_path), name="s")
    assert [row["status"] for row in result.rows] == ["finished", "failed", "finished"]
    (name, error), *others = result.failures.items()
    assert not others
    assert "shifted_topk" in name
    assert "give another SAE than was trained" in error
    assert list_checkpoints(result.folder / name)
    assert resume_sweep(result.folder).failures == result.failures


@pytest.mark.parametrize("type", registry.names())
def test_every_type_gives_back_what_it_trained(make_cache, tmp_path, type) -> None:
    hooks = ("layer_1", "layer_2") if registry.get(type).reads.several else ("layer_3",)
    settings = {k: v for k, v in SETTINGS.items() if k != "k" or "k" in registry.get(type).Config.__dataclass_fields__}
    settings |= {"cache": str(make_cache(hooks=hooks)), "type": type, "compute_dtype": "bfloat16"}
    choices = {f.name: f.metadata["choices"] for f in fields(registry.get(type).Config) if f.metadata.get("choices")}
    for normalize in ("unit_norm", "mean+dataset"):
        if normalize not in choices.get("normalize", (normalize,)):
            continue
        result = train_sae(**settings, normalize=normalize, runs_dir=str(tmp_path / normalize))
        assert (result.folder / SUMMARY).is_file()


def test_one_latent_that_falls_on_the_other_side_of_a_threshold_is_no_difference(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "runs_dir": str(tmp_path)}
    sae = train_sae(**settings, type="batchtopk").sae
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(sae)
    acts = sae.encode(x).values.detach()
    other.threshold.calibrated.fill_(float(acts[acts > 0].min()) * (1 + 1e-6))
    one = difference(sae, other, x)
    assert one.is_small
    assert one.fvu != one.fvu_again
    other.threshold.calibrated.fill_(float(acts.median()))
    assert not difference(sae, other, x).is_small


def test_numbers_of_a_difference(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "runs_dir": str(tmp_path)}
    sae = train_sae(**settings, type="topk").sae
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) + 3.0
    shifted = copy.deepcopy(sae)
    with torch.no_grad():
        shifted.b_dec += 1e-2
    found = difference(sae, shifted, x)
    norms = x.norm(dim=1)
    ours, theirs = sae(x).x_hat.detach(), shifted(x).x_hat.detach()
    scales = torch.maximum(norms.clamp_min(float(norms.median())), ours.norm(dim=1))
    errors = ((ours - theirs).norm(dim=1) / scales).sort().values
    assert found.row_error == pytest.approx(float(errors[-3]), rel=1e-4)  # 1 % of 200 rows may differ more
    scatter = (x - x.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float((x - ours).square().sum() / scatter), rel=1e-4)
    assert found.fvu_again == pytest.approx(float((x - theirs).square().sum() / scatter), rel=1e-4)
    assert not found.is_small


def test_an_sae_of_a_huge_error_has_rounding_of_its_size(make_cache, tmp_path) -> None:
    settings = {**SETTINGS, "cache": str(make_cache()), "runs_dir": str(tmp_path)}
    sae = train_sae(**settings, type="batchtopk").sae
    with torch.no_grad():
        sae.W_enc *= 1e5
    sae_core.save(sae, tmp_path / "huge", {})
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    found = difference(sae, sae_core.load(tmp_path / "huge"), x)
    assert found.fvu > 1e6
    assert found.is_small
