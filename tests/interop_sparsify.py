"""sparsify 1.3 against ours: files both ways, and reconstruction, loss terms and gradients from the same weights.

Run by `make interop`, in the peers' environment. Where definitions differ the test's docstring says how and why.
"""

from pathlib import Path

import pytest
import torch
from interop_kit import D_IN, D_SAE, TOLERANCE, K, difference, make, rows, step
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

from sae_granary import sae_core
from sae_granary.sae_core import SAE, Progress
from sae_granary.sae_core.errors import NotAnSAEError, OptionError

NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}


def coder(weights: SAE | None = None, **options: object) -> SparseCoder:
    """A sparse coder of theirs, with our weights if given."""
    theirs = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, **options))
    if weights is not None:
        ours = dict(weights.named_parameters())
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                value = ours[NAMES[name]]
                parameter.copy_(value if name in ("W_dec", "b_dec", "encoder.bias") else value.t())
    return theirs


def gradients(theirs: SparseCoder, loss: Tensor) -> dict[str, Tensor]:
    """Their gradients by our names."""
    theirs.zero_grad(set_to_none=True)
    loss.backward()
    out = {}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            out[NAMES[name]] = parameter.grad.t() if name in ("encoder.weight", "W_skip") else parameter.grad
    return out


def positive(sae: SAE) -> SAE:
    """Raise the encoder's bias: every row then has more than k positive pre-activations."""
    with torch.no_grad():
        sae.b_enc.add_(10.0)
    return sae


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "dataset", "mean", "mean+dataset"])
def test_our_export_computes_the_same_in_sparsify(normalize: str, tmp_path: Path) -> None:
    sae = make("topk", normalize=normalize).eval()
    sae_core.save_sparsify(sae, tmp_path, {"model_name": "m"})
    x = rows(seed=50)
    with torch.no_grad():
        theirs = SparseCoder.load_from_disk(tmp_path)
        assert difference(sae(x).x_hat, theirs(x).sae_out) < TOLERANCE
        acts = theirs.encode(x)
        dense = torch.zeros(len(x), D_SAE).scatter_(1, acts.top_indices, acts.top_acts)
        assert difference(sae_core.load(tmp_path).encode(x).dense(), dense) < TOLERANCE


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("normalize", ["none", "mean+dataset"])
def test_our_transcoders_compute_the_same_in_sparsify(name: str, normalize: str, tmp_path: Path) -> None:
    sample = {"in": rows(seed=1), "out": rows(seed=2).flip(1) - 3.0}
    cls = sae_core.registry.get(name)
    sae = cls(cls.Config(d_in=D_IN, d_sae=D_SAE, k=K, normalize=normalize))
    sae.initialize(sample, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        sae.after_step()
        sae.eval()
        sae_core.save_sparsify(sae, tmp_path)
        x_hat = SparseCoder.load_from_disk(tmp_path)(sample["in"], sample["out"]).sae_out
        assert difference(sae(sample).x_hat, x_hat) < TOLERANCE
        assert difference(sae_core.load(tmp_path)(sample).x_hat, x_hat) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}], ids=str)
def test_a_sparsify_folder_computes_the_same_here(options: dict[str, bool], tmp_path: Path) -> None:
    theirs = coder(**options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    theirs.save_to_disk(tmp_path)
    ours, x = sae_core.load(tmp_path), rows(seed=50)
    with torch.no_grad():
        out = ours({"in": x, "out": x} if options else x)
        assert difference(out.x_hat, theirs(x).sae_out) < TOLERANCE


def test_what_has_no_counterpart_is_refused(tmp_path: Path) -> None:
    SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, activation="groupmax")).save_to_disk(tmp_path)
    with pytest.raises(NotAnSAEError, match="activation='groupmax'"):
        sae_core.load(tmp_path)
    with pytest.raises(OptionError, match="batchtopk"):
        sae_core.save_sparsify(make("batchtopk"), tmp_path)


# -- the same weights and the same batch ---------------------------------------------------------------------------


def test_topk_fvu_and_gradients_are_equal() -> None:
    """sparsify divides by the batch's own scatter, ours by V, fixed at the start: fitted to this batch they agree."""
    x, sae = rows(), positive(make("topk", loss="fvu"))
    out, losses, grads = step(sae, x)
    theirs = coder(sae)
    lens = theirs(x)
    assert difference(out.x_hat, lens.sae_out) < TOLERANCE
    assert difference(losses["fvu"], lens.fvu) < TOLERANCE
    for name, grad in gradients(theirs, lens.fvu).items():
        assert difference(grads[name], grad) < TOLERANCE, name


def test_a_row_with_fewer_than_k_positive_preactivations_gets_other_gradients_there() -> None:
    """The reconstruction is equal, but their fused backward does not go back through the ReLU: the padding of such a
    row (codes that are 0) still receives gradients. Ours, and the formula's, are 0 there."""
    x, sae = rows(), make("topk", loss="fvu")
    with torch.no_grad():
        sae.b_enc.sub_(4.0)
    out, losses, grads = step(sae, x)
    assert out.codes.l0() < K
    theirs = coder(sae)
    lens = theirs(x)
    assert difference(losses["fvu"], lens.fvu) < TOLERANCE
    lens_grads = gradients(theirs, lens.fvu)
    assert difference(grads["W_dec"], lens_grads["W_dec"]) < TOLERANCE
    assert difference(grads["W_enc"], lens_grads["W_enc"]) > 1e-3

    h = (x - sae.b_dec).detach()
    W_enc = sae.W_enc.detach().clone().requires_grad_()
    values, indices = (h @ W_enc + sae.b_enc).topk(K)
    codes = torch.zeros(len(x), D_SAE).scatter(1, indices, values.relu())
    ((codes @ sae.W_dec + sae.b_dec - x).square().sum(1).mean() / sae.loss_variance).backward()
    assert difference(grads["W_enc"], W_enc.grad) < TOLERANCE


def test_auxk_differs_in_its_unit_and_reaches_the_encoder_only_here() -> None:
    """Theirs is divided by the variance of the rows, ours by that of the error it reconstructs (as the paper's code):
    without it AuxK fades as the reconstruction improves. Their fused backward drops the gradient of the
    pre-activations, so AuxK never trains the encoder rows of dead latents; ours does."""
    x, sae = rows(), positive(make("topk", loss="fvu", auxk_coef=1.0))
    dead = torch.arange(D_SAE) % 16 == 0
    sae.num_tokens_since_fired.zero_()
    sae.num_tokens_since_fired[dead] = sae.config.dead_after_tokens
    out = sae.train()(x)
    sae.zero_grad()
    losses = sae.losses(out, Progress(99, 100))
    losses["auxk"].backward()
    theirs = coder(sae)
    lens = theirs(x, dead_mask=dead)
    error = (x - out.x_hat).detach()
    unit = (error - error.mean(0)).square().sum() / (x - x.mean(0)).square().sum()
    assert difference(losses["auxk"] * unit, lens.auxk_loss) < TOLERANCE
    lens_grads = gradients(theirs, lens.auxk_loss)
    assert sae.W_dec.grad is not None
    assert sae.W_enc.grad is not None
    assert difference(sae.W_dec.grad * unit, lens_grads["W_dec"]) < TOLERANCE
    assert sae.W_enc.grad[:, dead].any()
    assert "W_enc" not in lens_grads or not lens_grads["W_enc"].any()


def test_multi_topk_has_the_same_value_and_reaches_the_encoder_only_here() -> None:
    """An eighth of the loss at 4k. sparsify takes the 4k from pre-activations whose gradient its fused backward drops:
    the term trains only its decoder. The paper (arXiv 2406.04093, section 4.2) has no such exception, nor has ours."""
    x, sae = rows(), positive(make("topk", loss="fvu", multi_topk=True))
    out = sae.train()(x)
    sae.zero_grad()
    term = sae.losses(out, Progress(99, 100))["multi_topk"]
    term.backward()
    theirs = coder(sae, multi_topk=True)
    fvu = theirs(x).multi_topk_fvu / 8
    assert difference(term, fvu) < TOLERANCE
    lens_grads = gradients(theirs, fvu)
    assert difference(sae.W_dec.grad, lens_grads["W_dec"]) < TOLERANCE
    assert sae.W_enc.grad.any()
    assert "W_enc" not in lens_grads or not lens_grads["W_enc"].any()


def test_decoder_projection_and_renormalization_are_equal() -> None:
    x, sae = rows(), positive(make("topk", loss="fvu"))
    step(sae, x)
    theirs = coder(sae)
    theirs(x).fvu.backward()
    sae.project_gradients()
    theirs.remove_gradient_parallel_to_decoder_directions()
    assert sae.W_dec.grad is not None
    assert difference(sae.W_dec.grad, theirs.W_dec.grad) < TOLERANCE
    with torch.no_grad():
        sae.W_dec.mul_(1.7)
        theirs.W_dec.mul_(1.7)
    sae.after_step()
    theirs.set_decoder_norm_to_unit_norm()
    assert difference(sae.W_dec, theirs.W_dec) < TOLERANCE
