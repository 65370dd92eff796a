"""`init_from`: start from the weights of another SAE instead of random ones."""

from __future__ import annotations

from pathlib import Path

import torch

from sae_granary import sae_core
from sae_granary.common.device import float64
from sae_granary.common.errors import ConfigError
from sae_granary.sae_core import SAE, Rows
from sae_granary.sae_core.files.fold import fold, unfold
from sae_granary.sae_core.files.io import NATIVE, OURS
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.folders import check_one_run

COMPARED_ROWS = 1024
SAME_FVU = 1e-3  # relative


def load_initial(path: str) -> SAE:
    """The SAE of a run's folder (its newest checkpoint if it is not complete), a checkpoint, SAELens or sparsify.

    Raises ConfigError for a folder that holds none.
    """
    folder = Path(path)
    check_one_run(folder)
    checkpoints = sorted(folder.glob("checkpoints/step_*/sae")) if not (folder / OURS).is_file() else []
    try:
        for native in (folder, folder / "sae", *checkpoints[-1:]):
            if (native / NATIVE).is_file():
                return sae_core.load_native(native)
        return sae_core.load(folder)
    except sae_core.SAEError as error:
        raise ConfigError(f"init_from={path}: {error}") from None


def check_initial(config: TrainConfig) -> None:
    """Refuse weights that a resolved config cannot start from. Raises ConfigError."""
    if config.init_from is None:
        return
    found, cls = load_initial(config.init_from), sae_core.registry.get(config.type)
    wanted = sae_core.make_config(cls, config.options)
    where = f"init_from={config.init_from} holds"
    if found.type_name != config.type:
        raise ConfigError(f"{where} a {found.type_name}: expected a {config.type}, or train with --type")
    for name in ("d_in", "d_sae", "d_out", "n_hooks"):
        ours, theirs = (getattr(options, name, None) for options in (wanted, found.config))
        if ours != theirs:
            raise ConfigError(f"{where} an SAE with {name}={theirs}, this run has {name}={ours}: they must be equal")
    per_row = wanted.normalize == "unit_norm"
    if found.normalizer.per_row != per_row:
        needed = "unit_norm" if found.normalizer.per_row else "one that is not unit_norm"
        raise ConfigError(f"{where} an SAE that expects normalize={needed}, this run has normalize={wanted.normalize}")


@torch.no_grad()
def start_from(sae: SAE, path: str, sample: Rows) -> str:
    """Give an initialized SAE the weights of another, in the units of its own normalization. Its buffers stay.

    Returns a line that says how well both reconstruct raw rows of the run (N, D) of each hook point.
    """
    source = load_initial(path)
    buffers = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    unfold(sae, fold(source))
    sae.after_step()
    for name, buffer in sae.named_buffers():
        buffer.copy_(buffers[name])
    rows = {name: values[:COMPARED_ROWS] for name, values in sample.items()}
    before, after = _training_fvu(source.to(sae.core.W_dec.device), rows), _training_fvu(sae, rows)
    line = f"init_from={path}: FVU {after:.4f} at the start, {before:.4f} as loaded"
    if abs(after - before) <= SAME_FVU * max(before, 1e-3):
        return line
    norms = source.core.W_dec.norm(dim=1)
    return (
        f"{line}: {sae.type_name} keeps decoder rows of norm 1, those of the file have {norms.min():.3g} to "
        f"{norms.max():.3g}; they moved into the encoder, so latents are now selected by activation times decoder norm"
        if sae.core.unit_decoder and norms.max() > 1.001 * norms.min()
        else f"{line}: options or scales differ between this run and the file, so other latents are selected"
    )


def _training_fvu(sae: SAE, rows: Rows) -> float:
    """FVU with the activation of training, where batch-wise selections need no threshold. The mode stays."""
    training = sae.training
    out = sae.train()(rows)
    sae.train(training)
    x, x_hat = float64(out.x), float64(out.x_hat)
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum().clamp_min(1e-30))
