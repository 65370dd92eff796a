"""Variants of a user's own save what they trained, with no code for files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from sae_kit import new
from torch import nn

from sae_granary import sae_core
from sae_granary.sae_core import FREE, PRE_ACTS, SAE, Activation, Codes, PerLatent, Progress, option, registry
from sae_granary.sae_core.variants.topk import TopKSAE


class Shrunk(SAE):
    """What exceeds a threshold, shrunk by it and stretched per latent, plus a matrix of its own behind the decoder."""

    latents: ClassVar = {**SAE.latents, "threshold": PerLatent(start=0.2), "stretch": PerLatent(1.5, unit=FREE)}
    linear_paths = ("W_past",)

    @dataclass(frozen=True)
    class Config(SAE.Config):
        shrink: float = option(1.0, help="subtracted from every pre-activation", ge=0, unit=PRE_ACTS)

    def build(self):
        super().build()
        self.mixing = nn.Parameter(torch.eye(self.config.d_sae))

    def activate(self, h):
        pre_acts = self.pre_acts(h)
        kept = pre_acts.above(0.0)
        p = self.encode_at(h, kept) - self.config.shrink - self.threshold[kept.indices]
        return Activation(Codes(torch.relu(p) * self.stretch[kept.indices], kept.pattern), pre_acts)

    def reconstruct(self, codes):
        return (codes.dense() @ self.mixing) @ self.W_dec + self.b_dec


class ShrunkUnit(Shrunk):
    """The same with decoder rows of unit norm."""

    unit_decoder = True


class SoftTopK(TopKSAE):
    """The variant of examples/own_variant.py."""

    @dataclass(frozen=True)
    class Config(TopKSAE.Config):
        shrink: float = option(1.0, help="subtracted from every kept pre-activation", ge=0, unit=PRE_ACTS)

    def _codes(self, h, pre_acts, k):
        kept = self.select(pre_acts, k)
        return Codes(torch.relu(self.encode_at(h, kept) - self.config.shrink), kept.pattern)


class Unmarked(SoftTopK):
    """The same with an option that does not say its unit."""

    @dataclass(frozen=True)
    class Config(TopKSAE.Config):
        shrink: float = option(1.0, help="subtracted from every kept pre-activation", ge=0)


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    own = (Shrunk, ShrunkUnit, SoftTopK, Unmarked)
    for cls in own:
        registry.register(cls.__name__)(cls)
    yield
    for cls in own:
        registry._VARIANTS.pop(cls.__name__)


def rows(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, 8, generator=torch.Generator().manual_seed(9))
    weights = torch.rand(n, 24, generator=generator) * (torch.rand(n, 24, generator=generator) < 0.2)
    return 5 * weights @ directions + 2.0


def trained(name: str, normalize: str) -> SAE:
    sae = new(name, {"k": 4}, d_in=8, d_sae=32, normalize=normalize).train()
    sae.initialize(rows(512, 0), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(30):
        losses = sae.losses(sae(rows(64, step)), Progress(step, 30))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        sae.project_gradients()
        optimizer.step()
        sae.after_step()
    return sae.eval()


@torch.no_grad()
def difference(sae: SAE, folder: Path) -> float:
    """Largest distance of the reconstructions in memory and from the files, in norms of the rows."""
    sae_core.save(sae, folder)
    x = rows(200, 77)
    here, there = sae(x), sae_core.load(folder)(x)
    assert here.codes.l0() > 0
    return float(((here.x_hat - there.x_hat).norm(dim=1) / x.norm(dim=1)).max())


@pytest.mark.parametrize("normalize", ["dataset", "mean+dataset", "unit_norm", "none"])
@pytest.mark.parametrize("name", ["SoftTopK", "Shrunk", "ShrunkUnit"])
def test_what_is_saved_is_what_was_trained(name: str, normalize: str, tmp_path: Path) -> None:
    assert difference(trained(name, normalize), tmp_path) < 1e-5


def test_an_option_that_does_not_say_its_unit_is_not_rescaled(tmp_path: Path) -> None:
    assert difference(trained("Unmarked", "dataset"), tmp_path) > 1e-3


def test_a_rescaled_option_has_no_bound_but_zero() -> None:
    with pytest.raises(ValueError, match="its only bound can be 0"):
        option(1.0, help="", le=2.0, unit=PRE_ACTS)
