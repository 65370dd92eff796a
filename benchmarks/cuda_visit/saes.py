"""Rows, SAEs and settings that the checks and the times share."""

from dataclasses import fields

import torch
from torch import Tensor

from sae_granary.sae_core import SAE, Rows, make_config, registry
from sae_granary.sae_core.kernels import choose
from sae_granary.train.config.settings import TrainConfig

TRAINED_L0 = 64  # active latents per row of the types without k


def use(kernels: str, device: str) -> None:
    """Take these kernels on a device. Beside a GPU, tensors on the CPU keep the eager ones."""
    choose("auto" if kernels == "triton" and device != "cpu" else kernels)


def one_hook_types() -> list[str]:
    """Types that read one hook point."""
    return [name for name in registry.names() if registry.get(name).reads.one_row]


def options_of(name: str) -> set[str]:
    """Names of a type's own settings."""
    return {spec.name for spec in fields(registry.get(name).Config)}


def has_k(name: str) -> bool:
    """Whether a type has a fixed number of active latents per row."""
    return "k" in options_of(name)


def rows_for(name: str, n_rows: int, d_in: int, device: str) -> Rows:
    """A batch as a type reads it: of one hook point, of two, or with the row before each row."""
    rows = {"x": mixtures(n_rows, d_in, device)}
    return rows if registry.get(name).reads.one_row else {**rows, "y": mixtures(n_rows, d_in, device, seed=1)}


def mixtures(n_rows: int, d_in: int, device: str, seed: int = 0) -> Tensor:
    """Sparse mixtures of directions: rows whose pre-activations have the heavy tail of real ones."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2048, d_in, generator=generator).to(device)
    draw = torch.rand(n_rows, 2048, generator=generator)
    weights = torch.where(draw < 0.02, 50 * draw, 0.0).to(device)
    return weights @ directions + 0.1 * torch.randn(n_rows, d_in, generator=generator).to(device)


def start(name: str, d_in: int, d_sae: int, k: int, rows: Rows) -> SAE:
    """An SAE fitted to rows on their device; without k, about TRAINED_L0 latents per row are active."""
    cls, device = registry.get(name), rows["x"].device
    sizes = {"d_in": d_in, "d_sae": d_sae, "k": k, "n_hooks": len(rows)}
    own = options_of(name)
    sae = cls(make_config(cls, {option: value for option, value in sizes.items() if option in own})).to(device)
    sae.initialize(rows, torch.Generator(device=device).manual_seed(0))
    if not has_k(name):
        with torch.no_grad():
            pre_acts = sae.pre_acts(sae.encoder_input({hook: part[:64] for hook, part in rows.items()})).dense
            above = pre_acts.flatten().topk(max(1, pre_acts.numel() * min(TRAINED_L0, d_sae // 16) // d_sae)).values
            sae.encoder_bias.sub_(above.min())
    return sae


def settings(name: str, device: str, lr: float, compute_dtype: str = "float32") -> TrainConfig:
    """A long run at a constant rate."""
    return TrainConfig(
        type=name, device=device, lr=lr, steps=10**6, lr_schedule="constant", compute_dtype=compute_dtype
    )
