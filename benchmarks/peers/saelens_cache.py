"""SAELens' cached activations: the folder that CacheActivationsRunner leaves, and the store that its trainer reads.

The runner needs a language model, so the shards are made here from plain rows, with its features; its own code merges
them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HOOK, CONTEXT = "rows", 128  # rows per context, SAELens' default
SHARD_CONTEXTS = 256


def write(rows: np.ndarray, folder: Path) -> None:
    """Write (N, D) float32 rows, N a multiple of CONTEXT, as contexts with their token ids."""
    from datasets import Array2D, Dataset, Features, Sequence, Value, disable_progress_bars
    from sae_lens import CacheActivationsRunner

    disable_progress_bars()
    contexts = torch.from_numpy(rows).reshape(-1, CONTEXT, rows.shape[1])
    features = Features(
        {
            HOOK: Array2D(shape=tuple(contexts.shape[1:]), dtype="float32"),
            "token_ids": Sequence(Value(dtype="int32"), length=CONTEXT),
        }
    )
    shards = folder / ".tmp_shards"
    shards.mkdir(parents=True)
    for number, shard in enumerate(contexts.split(SHARD_CONTEXTS)):
        columns = {HOOK: shard, "token_ids": torch.zeros(len(shard), CONTEXT, dtype=torch.int32)}
        Dataset.from_dict(columns, features=features).save_to_disk(shards / f"shard_{number:05d}", num_shards=1)
    CacheActivationsRunner._consolidate_shards(shards, folder, copy_files=False)


def batches(folder: Path, d_in: int, batch_size: int, device: str, buffer_rows: int, mixing: float) -> Iterator[Tensor]:
    """What LanguageModelSAETrainingRunner feeds its trainer with `use_cached_activations`: endless (B, D) batches."""
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAEConfig
    from sae_lens.training.activations_store import ActivationsStore

    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=d_in, d_sae=1, k=1),
        hook_name=HOOK,
        context_size=CONTEXT,
        use_cached_activations=True,
        cached_activations_path=str(folder),
        n_batches_in_buffer=buffer_rows // CONTEXT,  # its buffer holds that many contexts
        activations_mixing_fraction=mixing,
        train_batch_size_tokens=batch_size,
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    model: Any = None  # only asked for activations that are not cached
    texts = Dataset.from_dict({"tokens": [[0] * CONTEXT]})
    return iter(ActivationsStore.from_config(model, config, override_dataset=texts))
