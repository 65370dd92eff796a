"""Train SAEs from an activation cache.

from sae_granary.train import train_sae, resume_training
result = train_sae(cache="cache/bert_l6", type="batchtopk", k=32)
result.sae, result.folder, result.summary

from sae_granary.train import train_sweep  # many from one stream of batches
train_sweep({"type": ["topk", "batchtopk"], "k": [16, 32]}, cache="cache/bert_l6").rows
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_granary.train.config.settings import TrainConfig
    from sae_granary.train.run import resume_training, train_sae
    from sae_granary.train.sweeps.results import SweepResult
    from sae_granary.train.sweeps.sweep import resume_sweep, train_sweep
    from sae_granary.train.trainer import Result

_MODULES = {
    "Result": "trainer",
    "SweepResult": "sweeps.results",
    "TrainConfig": "config.settings",
    "resume_sweep": "sweeps.sweep",
    "resume_training": "run",
    "train_sae": "run",
    "train_sweep": "sweeps.sweep",
}

__all__ = ["Result", "SweepResult", "TrainConfig", "resume_sweep", "resume_training", "train_sae", "train_sweep"]


def __getattr__(name: str) -> Any:
    # Lazily: `sae-train --help` answers without importing torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
