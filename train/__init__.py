"""Train SAEs from an activation cache.

from sae_granary.train import train_sae, resume_training
result = train_sae(cache="cache/bert_l6", type="batchtopk", k=32)
result.sae, result.folder, result.summary

from sae_granary.train import train_sweep  # many from one stream of batches
train_sweep({"type": ["topk", "batchtopk"], "k": [16, 32]}, cache="cache/bert_l6").rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_granary.train.config.settings import TrainConfig
    from sae_granary.train.run import Result, resume_training, train_sae
    from sae_granary.train.sweeps.sweep import SweepResult, resume_sweep, train_sweep

_SWEEPS = ("SweepResult", "resume_sweep", "train_sweep")

__all__ = ["Result", "SweepResult", "TrainConfig", "resume_sweep", "resume_training", "train_sae", "train_sweep"]


def __getattr__(name: str) -> Any:
    # Lazily: `sae-train --help` answers without importing torch.
    if name == "TrainConfig":
        from sae_granary.train.config.settings import TrainConfig

        return TrainConfig
    if name in _SWEEPS:
        from sae_granary.train.sweeps import sweep

        return getattr(sweep, name)
    if name in __all__:
        from sae_granary.train import run

        return getattr(run, name)
    raise AttributeError(f"module 'train' has no attribute {name!r}")
