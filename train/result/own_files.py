"""Every finished run loads its own files again and compares, so that no variant can save another SAE than it trained.

Shapes: N rows, D = d_out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_granary import sae_core
from sae_granary.common import files
from sae_granary.common.device import float64
from sae_granary.sae_core import SAE, Rows, SAEOutput
from sae_granary.train.errors import FilesDifferError
from sae_granary.train.result.evaluate import in_evaluation

MAX_ROW_ERROR = 1e-4  # |difference of two reconstructions| / |row|
MAX_FVU_ERROR = 1e-4
# Rows that may differ more: a pre-activation within rounding of a threshold, or of the k-th largest, may fall on either
# side of it. What they amount to is in the FVU.
TIED_SHARE = 0.01


@dataclass(frozen=True)
class Difference:
    """Comparison of two SAEs on one batch of rows."""

    row_error: float  # of all rows but the TIED_SHARE that differ most, the largest
    fvu: float  # of the first
    fvu_again: float  # of the second

    @property
    def is_small(self) -> bool:
        """Whether both give the same reconstruction up to rounding (for an FVU above 1, up to its last digits)."""
        fvu_error = abs(self.fvu - self.fvu_again) / max(self.fvu, 1.0)
        return self.row_error <= MAX_ROW_ERROR and fvu_error <= MAX_FVU_ERROR


def save_and_check(sae: SAE, folder: Path, metadata: Mapping[str, Any], rows: Rows) -> None:
    """Write the inference form of a trained SAE, durably, if what `sae_core.load` makes of it is the same SAE.

    `rows` is a batch of raw rows (N, D) of each hook point, on the device of the SAE.
    Raises FilesDifferError and NonFiniteError. After them, or any other exception, none of the files is left in the
    folder.
    """
    paths = sae_core.save(sae, folder, metadata)
    try:
        _check(sae, folder, rows)
    except BaseException:  # files that nobody checked must not look like a result
        for path in paths:
            path.unlink()
        raise
    for path in paths:
        files.sync_file(path)


def _check(sae: SAE, folder: Path, rows: Rows) -> None:
    remedy = (
        f"{folder} has no result, its checkpoints hold the weights as trained; correct the variant (an option in units "
        f"of pre-activations is declared with unit=PRE_ACTS), then run: sae-train resume {folder}"
    )
    try:
        again = sae_core.load(folder, sae.core.W_dec.device, sae.shards)
    except sae_core.SAEError as error:
        raise FilesDifferError(f"the files of this {sae.type_name} SAE cannot be loaded: {error}; {remedy}") from None
    found = difference(sae, again, rows)
    if not found.is_small:
        raise FilesDifferError(
            f"the files of this {sae.type_name} SAE give another SAE than was trained: FVU {found.fvu:.6f} trained, "
            f"{found.fvu_again:.6f} from the files, rows differ by {found.row_error:.1e} of their norm (expected at "
            f"most {MAX_ROW_ERROR:.0e}); {remedy}"
        )


@torch.no_grad()
def difference(sae: SAE, other: SAE, rows: Rows) -> Difference:
    """Compare the reconstructions of two SAEs in inference. Each is left in the mode that it was in."""
    first, second = _infer(sae, rows), _infer(other, rows)
    x, x_hat, again = (float64(t) for t in (first.x, first.x_hat, second.x_hat))
    norms = x.norm(dim=1)
    # A row far shorter than most, or than its reconstruction, is the difference of larger numbers: their rounding.
    scales = torch.stack([norms, norms.median().expand_as(norms), x_hat.norm(dim=1)]).amax(0).clamp_min(1e-30)
    errors = (x_hat - again).norm(dim=1) / scales
    n_tied = math.ceil(TIED_SHARE * len(errors))
    row_error = errors.sort().values[: max(len(errors) - n_tied, 1)].max()
    return Difference(float(row_error), _fvu(x, x_hat), _fvu(x, again))


def _infer(sae: SAE, rows: Rows) -> SAEOutput:
    with in_evaluation(sae):
        out: SAEOutput = sae(rows)
    return out


def _fvu(x: Tensor, x_hat: Tensor) -> float:
    """sum |x - x_hat|^2 / sum |x - mean|^2; 0 where all rows are equal."""
    scatter = float((x - x.mean(0)).square().sum())
    return float((x - x_hat).square().sum()) / scatter if scatter > 0 else 0.0
