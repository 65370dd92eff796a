"""`init_from` with SAEs of other tools: the run starts from the function of the file, and says where it cannot."""

from pathlib import Path

import pytest
import torch
from sae_kit import new
from test_train_log import Recorder
from test_train_resume import StopAt

from sae_granary import resume_training, sae_core, train_sae
from sae_granary.sae_core import SAE
from sae_granary.sae_core.files import saelens
from sae_granary.sae_core.files.fold import Folded, fold, unfold
from sae_granary.train.errors import InterruptedRunError

D_IN, D_SAE, K = 16, 32, 4


def rows(n: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, D_IN, generator=torch.Generator().manual_seed(99))
    weights = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.1)
    return 3 * weights @ directions + 0.05 * torch.randn(n, D_IN, generator=generator) + 1.0


def make(name: str, **options: object) -> SAE:
    """An SAE fitted to `rows()` whose gates and thresholds all matter."""
    sae = new(name, {"k": K}, d_in=D_IN, d_sae=D_SAE, normalize="none", **options)
    sae.initialize(rows(), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for number in sae.latents:
            if isinstance(parameter := getattr(sae, number), torch.nn.Parameter):
                parameter.add_(0.3 * (torch.rand(D_SAE, generator=generator) - 0.5))
    return sae


def with_row_norms(sae: SAE, norms: torch.Tensor) -> Folded:
    """The weights with decoder rows of these norms (F,); the encoder as it is."""
    folded = fold(sae)
    return folded._replace(weights={**folded.weights, "W_dec": folded.weights["W_dec"] * norms[:, None]})


def started(folded: Folded, normalize: str) -> SAE:
    sae = folded.cls(sae_core.make_config(folded.cls, {**vars(folded.config), "normalize": normalize}))
    sae.initialize(rows(seed=5), torch.Generator().manual_seed(3))
    with torch.no_grad():
        unfold(sae, folded)
        sae.after_step()
    return sae


UNEVEN = torch.rand(D_SAE, generator=torch.Generator().manual_seed(4)) * 1.5 + 0.25


@pytest.mark.parametrize("normalize", ["none", "mean+dataset"])
def test_gated_with_uneven_decoder_rows_starts_from_the_same_function(normalize: str) -> None:
    folded = with_row_norms(make("gated"), UNEVEN)
    sae, x = started(folded, normalize), rows(1000, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(sae(x).x_hat, folded.build()(x).x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("name", ["topk", "abstopk"])
def test_topk_with_uneven_decoder_rows_selects_by_activation_times_norm(name: str) -> None:
    folded = with_row_norms(make(name), UNEVEN)
    x = rows(1000, seed=9)
    pre_acts = ((x - folded.weights["b_dec"]) @ folded.weights["W_enc"] + folded.weights["b_enc"]) * UNEVEN
    size = pre_acts.abs() if name == "abstopk" else pre_acts
    kept = torch.zeros_like(pre_acts).scatter(1, size.topk(K, dim=1).indices, 1.0) * pre_acts
    kept = kept if name == "abstopk" else kept.relu()
    expected = kept @ (folded.weights["W_dec"] / UNEVEN[:, None]) + folded.weights["b_dec"]
    with torch.no_grad():
        torch.testing.assert_close(started(folded, "none")(x).x_hat, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gated", "topk", "abstopk"])
def test_decoder_rows_of_zeros_stay_silent_and_get_a_direction(name: str) -> None:
    norms = torch.ones(D_SAE).index_fill(0, torch.tensor([0, 3, 7]), 0.0)
    folded = with_row_norms(make(name), norms)
    sae, x = started(folded, "none"), rows(1000, seed=9)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    with torch.no_grad():
        assert not bool(sae(x).codes.dense()[:, norms == 0].any())


@pytest.mark.parametrize(("of_file", "of_run"), [("none", "mean"), ("none", "dataset"), ("mean+dataset", "dataset")])
def test_a_crosscoder_across_normalizations_differs_by_its_selection_alone(of_file: str, of_run: str) -> None:
    """Hook points of other scales change the norms of decoder rows, which the selection compares."""
    hooks = {"a": rows(), "b": 5 * rows(seed=1) + 30}
    options = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "n_hooks": 2}
    file, run = (new("crosscoder", **options, normalize=name) for name in (of_file, of_run))
    for seed, sae in enumerate((file, run)):
        sae.initialize(hooks, torch.Generator().manual_seed(seed))
    unfold(run, fold(file))
    with torch.no_grad():
        run.after_step()
        chosen, now = (sae.encode(hooks).dense() > 0 for sae in (file, run))
        same = (chosen == now).all(1)
        error = (file(hooks).x_hat - run(hooks).x_hat).norm(dim=1) / file(hooks).x_hat.norm(dim=1)
    assert same.float().mean() > 0.4
    assert error[same].max() < 1e-6  # float32; 7e-16 in float64
    assert bool(same.all()) == (of_run == "mean")


@pytest.mark.parametrize("name", ["gated", "topk"])
def test_the_start_of_a_run_names_its_fvu_and_what_changed(make_cache, tmp_path: Path, name: str) -> None:
    folder, recorder = tmp_path / "foreign", Recorder()
    common = {"cache": str(make_cache()), "runs_dir": str(tmp_path), "type": name, "d_sae": D_SAE, "batch_size": 64}
    common |= {"k": K} if name == "topk" else {}
    first = train_sae(**common, steps=40, lr=0.01, name="first")
    uneven = with_row_norms(first.sae, UNEVEN).build()
    folder.mkdir()
    sae_core.save(uneven, folder)
    (folder / "granary.json").unlink()  # what is left are SAELens' files
    assert (folder / saelens.CFG).is_file()
    stopper = StopAt(1)
    common |= {"steps": 2, "name": "second", "init_from": str(folder)}
    with pytest.raises(InterruptedRunError):
        train_sae(**common, sinks=[recorder, stopper], stop=stopper.stop)
    (told,) = [text for text in recorder.messages if text.startswith("init_from=")]
    assert "at the start" in told
    assert ("selected by activation times decoder norm" in told) == (name == "topk")
    summary = resume_training(tmp_path / "second").summary
    assert summary["notes"][0] == told
