"""Per-latent parameters (biases, thresholds), declared once per variant.

Initialization, resets of dead latents, folding and files follow from the declaration. Shapes: F = d_sae latents.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sae_granary.common.device import float64, lacks_float64
from sae_granary.sae_core.options import PRE_ACTS
from sae_granary.sae_core.ranks.reduce import ALONE, Alone

EMA_DECAY = 0.999
# Positive floats are ordered like their bits; dropping 10 of 23 mantissa bits leaves bins 1.2e-4 wide (relative).
DROPPED_BITS = 10
N_BINS = 2 ** (31 - DROPPED_BITS)
NEAR = 0.9  # of a first estimate of a threshold: what is smaller is not counted
Entries = Callable[[float], Iterable[tuple[int, Tensor]]]


@dataclass(frozen=True)
class PerLatent:
    """A parameter (F,) of a variant, listed in its `latents` under the attribute's name."""

    start: float | Callable[[Any], float] = 0.0  # at the start and after a reset; may depend on the Config
    unit: str = PRE_ACTS  # or FREE: what it is multiplied by when pre-activations are

    def make(self, config: Any) -> nn.Parameter | nn.Module:
        """Create the parameter."""
        return nn.Parameter(torch.full((config.d_sae,), self._start(config)))

    @torch.no_grad()
    def reset(self, held: Any, config: Any, latents: Tensor | slice = slice(None)) -> None:
        """Reset latents (n,) to their initial values."""
        held[latents] = self._start(config)

    def read(self, held: Any, W_dec: Tensor) -> Tensor:
        """Return the numbers (F,)."""
        numbers: Tensor = held.detach()
        return numbers

    @torch.no_grad()
    def write(self, held: Any, numbers: Tensor) -> None:
        """Set the numbers (F,)."""
        held.copy_(numbers)

    def _start(self, config: Any) -> float:
        return self.start(config) if callable(self.start) else self.start


def latent_numbers(sae: Any) -> dict[str, Tensor]:
    """Return the numbers (F,) that each latent of an SAE has, by name."""
    return {name: declared.read(getattr(sae, name), sae.W_dec) for name, declared in sae.latents.items()}


class SharedThreshold(PerLatent):
    """One inference threshold shared by all latents, a `BatchThreshold`; files store it once per latent."""

    def make(self, config: Any) -> nn.Parameter | nn.Module:
        """Create the threshold."""
        return BatchThreshold()

    def reset(self, held: Any, config: Any, latents: Tensor | slice = slice(None)) -> None:
        """Do nothing: the other latents still use the threshold."""

    def read(self, held: Any, W_dec: Tensor) -> Tensor:
        """Return the threshold, F times."""
        threshold: Tensor = held.value.to(W_dec.dtype).to(W_dec.device)
        return threshold.expand(len(W_dec)).clone()

    @torch.no_grad()
    def write(self, held: Any, numbers: Tensor) -> None:
        """Set the threshold from numbers (F,)."""
        held.calibrated.copy_(numbers[0])


def _bins(values: Tensor) -> Tensor:
    """How many positive numbers fall in each of N_BINS bins of the bits of float32."""
    bits = values.float().contiguous().view(torch.int32).view(-1)
    numbered = (bits >> DROPPED_BITS).clamp_(min=-1).add_(1)  # 0: the negative ones
    counts = torch.bincount(numbered, minlength=N_BINS + 1)[1:]
    counts[0] -= (bits == 0).sum()
    return counts


class BatchThreshold(nn.Module):
    """The inference threshold of batch-wise selections: an EMA while training, a calibration at the end.

    E[smallest kept activation], in float64; an EMA that starts at 0 is divided by its weight so far.
    On a device without float64 the three numbers stay on the CPU.
    """

    ema: Tensor
    n_updates: Tensor
    calibrated: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros((), dtype=torch.float64))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))
        # NaN until a calibration or a loaded file sets it.
        self.register_buffer("calibrated", torch.full((), torch.nan, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchThreshold":
        if lacks_float64(fn(torch.zeros(())).device):
            return self
        moved: BatchThreshold = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    @torch.no_grad()
    def update(self, kept: Tensor) -> None:
        """Update the average from the positive ones of the kept activations (nnz,) of one training batch."""
        if kept.numel() == 0:
            return
        smallest = float64(kept.masked_fill(kept <= 0, torch.inf).min())
        found = smallest < torch.inf
        moved = (self.ema * EMA_DECAY).add_(smallest, alpha=1 - EMA_DECAY)
        torch.where(found, moved, self.ema, out=self.ema)
        self.n_updates += found

    @property
    def value(self) -> Tensor:
        """The calibrated threshold, else the EMA; 0 before any batch."""
        corrected = self.ema / (1 - EMA_DECAY ** float64(self.n_updates)).clamp_min(1e-300)
        return torch.where(self.calibrated.isnan(), corrected, self.calibrated)

    @torch.no_grad()
    def calibrate(self, entries: Entries, k: float, shards: Alone = ALONE, *, again: bool = False) -> None:
        """Set the threshold so that on average k pre-activations per row exceed it, over all batches.

        `entries(bound)` gives the number of rows of each batch and its pre-activations, at least those above the bound.
        If it may be called `again`, only those near the threshold of the first batch and above are counted, and all of
        them if that was too high. Where `shards` divide the latents, each has its own columns of the same rows.
        """
        bound = 0.0
        if again:
            bound = NEAR * _edge(_first_that_fits(islice(entries(0.0), 1), k, shards))
        lowest = _first_that_fits(entries(bound), k, shards)
        if bound > 0 and _edge(lowest) <= bound * (1 + 2**-11):  # of some bins entries are missing
            lowest = _first_that_fits(entries(0.0), k, shards)
        self.calibrated.fill_(_edge(lowest))


def _edge(number: int) -> float:
    """The smallest number in a bin."""
    return torch.tensor(number << DROPPED_BITS, dtype=torch.int32).view(torch.float32).item()


def _first_that_fits(batches: Iterable[tuple[int, Tensor]], k: float, shards: Alone) -> int:
    """The first bin which with all higher ones holds at most k entries per row.

    A histogram over the bits of the floats keeps memory constant: 2**21 counters for any number of rows.
    """
    counts, n_rows = torch.zeros(N_BINS, dtype=torch.int64), 0
    for n, entries in batches:
        n_rows += n
        counts += _bins(entries).cpu()
    from_bin = shards.sum(counts).flip(0).cumsum(0).flip(0)
    return int((from_bin > n_rows * k).sum())
