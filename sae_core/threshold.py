"""The inference threshold of batch-wise selections: a bias-corrected EMA while training, a calibration at the end."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

EMA_DECAY = 0.999
# Positive floats are ordered like their bits; dropping 10 of 23 mantissa bits leaves bins 1.2e-4 wide (relative).
DROPPED_BITS = 10
N_BINS = 2 ** (31 - DROPPED_BITS)


class BatchThreshold(nn.Module):
    """E[smallest kept activation], in float64; an EMA that starts at 0 is divided by its weight so far."""

    ema: Tensor
    n_updates: Tensor
    calibrated: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros((), dtype=torch.float64))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))
        # NaN until a calibration or a loaded file sets it.
        self.register_buffer("calibrated", torch.full((), torch.nan, dtype=torch.float64))

    @torch.no_grad()
    def update(self, kept: Tensor) -> None:
        """Take in the kept activations (nnz,) of one training batch."""
        if kept.numel() == 0:
            return
        self.ema.mul_(EMA_DECAY).add_(kept.min().double(), alpha=1 - EMA_DECAY)
        self.n_updates += 1

    @property
    def value(self) -> Tensor:
        """The calibrated threshold, else the EMA; 0 before any batch."""
        corrected = self.ema / (1 - EMA_DECAY ** self.n_updates.double()).clamp_min(1e-300)
        return torch.where(self.calibrated.isnan(), corrected, self.calibrated)

    @torch.no_grad()
    def calibrate(self, pre_acts: Iterable[Tensor], k: int) -> None:
        """Set the threshold at which the mean number of larger pre-activations per row is k, over all batches (N, F).

        A histogram over the bits of the floats keeps memory constant: 2**21 counters whatever the number of rows.
        """
        counts = torch.zeros(N_BINS, dtype=torch.int64)
        n_rows = 0
        for batch in pre_acts:
            n_rows += batch.shape[0]
            positive = batch[batch > 0].float()
            counts += torch.bincount(positive.view(torch.int32) >> DROPPED_BITS, minlength=N_BINS).cpu()
        above = counts.flip(0).cumsum(0).flip(0)  # above[b]: entries in bin b and higher
        lowest = int((above > n_rows * k).sum())  # the first bin whose entries all fit
        edge = torch.tensor(max(lowest, 0) << DROPPED_BITS, dtype=torch.int32).view(torch.float32)
        self.calibrated.copy_(edge.double())
