"""Rows of a cache as torch tensors. The rest of the reader works without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def as_tensor(rows: npt.NDArray[Any]) -> Tensor:
    """Copy an array into a tensor of the same dtype. torch does not take the bfloat16 arrays of ml_dtypes directly."""
    if rows.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(rows).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(rows))
