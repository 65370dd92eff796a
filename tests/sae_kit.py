"""SAEs of any type for tests: new ones, and folders of SAEs with random weights."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import torch

from sae_granary import sae_core
from sae_granary.sae_core import SAE, registry


def new(name: str, usual: Mapping[str, object] | None = None, **options: object) -> SAE:
    """An SAE of a type with these options; `usual` are for the types that have them, unless `options` hold others."""
    cls = registry.get(name)
    known = {spec.name for spec in fields(cls.Config)}
    given = {option: value for option, value in (usual or {}).items() if option in known}
    return cls(sae_core.make_config(cls, given | options))


def copying(d_in: int, scale: float = 1.0) -> SAE:
    """x_hat = scale * (ReLU(x) - ReLU(-x)): the identity, or zero for scale 0."""
    sae = new("vanilla", d_in=d_in, d_sae=2 * d_in, normalize="none")
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)], 1))
        sae.W_dec.copy_(scale * sae.W_enc.t())
    return sae


def saved(
    folder: Path,
    name: str = "topk",
    *,
    silent: Iterable[int] = (),
    metadata: Mapping[str, object] | None = None,
    **options: object,
) -> Path:
    """The folder of an SAE with random weights, by default for rows of width 16; the `silent` latents never fire."""
    sae = new(name, {"k": 4, "n_hooks": 2}, **{"d_in": 16, **options})
    sae.core.reset_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for latent in silent:
            sae.b_enc[latent] = -1e6
    sae_core.save(sae, folder, metadata)
    return folder
