"""One cell of the benchmark: a world through the cache and the trainer, then measured against the truth."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ground_truth import metrics
from benchmarks.ground_truth.generators import Floats, Sample, World
from sae_granary import open_cache, train_sae
from sae_granary.cache.format.spec import CacheSpec
from sae_granary.cache.load.loader import Loader
from sae_granary.cache.load.selection import Holdout, Selection
from sae_granary.cache.write.writer import CacheWriter
from sae_granary.common.process import tuned_process
from sae_granary.common.rows import FLAG_WINDOW_START, DocumentRow, HookPoint, Rows
from sae_granary.sae_core import SAE
from sae_granary.sae_core.metrics import Evaluator

HOOK = "layer_0"
ROWS_PER_DOCUMENT = 50  # the hold-out goes by documents
HOLDOUT = 0.1


def write_cache(path: Path, world: World, data: Sample, seed: int) -> None:
    """Write the rows as a harvest would: documents of one window each, all in one shard."""
    point = HookPoint(HOOK, HOOK, "output", None, data.x.shape[1])
    provenance = {"model": {"id": f"synthetic-{world.name}", "kind": "transformer", "is_decoder": False}}
    spec = CacheSpec("token", (point,), "float32", len(data.x), provenance, {"world": world.name, "seed": seed})
    ordinal = np.arange(len(data.x))
    doc_id, position = ordinal // ROWS_PER_DOCUMENT, (ordinal % ROWS_PER_DOCUMENT).astype(np.int32)
    flags = np.where(position == 0, FLAG_WINDOW_START, 0).astype(np.uint8)
    token_id = np.zeros(len(ordinal), np.int32)
    rows = Rows({HOOK: data.x}, token_id, doc_id, doc_id.astype(np.uint64), position, position, flags)
    documents = [DocumentRow(int(doc), world.name, int(doc), "") for doc in np.unique(doc_id)]
    with CacheWriter.open(path, spec) as writer:
        writer.begin_buffer({"next_doc": 0})
        writer.append(rows, documents)
        writer.finish({"documents": len(documents)})


def train(path: Path, runs: Path, world: World, settings: Mapping[str, Any], seed: int) -> SAE:
    """Train as `sae-train run` does; the dictionary has as many latents as there are features."""
    known = {"cache": str(path), "runs_dir": str(runs), "seed": seed, "holdout": HOLDOUT, "save_every": 0}
    with tuned_process("cpu"):
        return train_sae(**known, **{"d_sae": world.n_features, "device": "cpu", **settings}).sae


@torch.no_grad()
def measure(sae: SAE, path: Path, world: World, activations: Floats) -> dict[str, float]:
    """Every number of the table, on the held-out rows in inference."""
    opened = open_cache(path)
    held_out = {"selection": Selection(holdout=Holdout(HOLDOUT), part="heldout"), "epochs": 1, "with_rows": True}
    with Loader(opened, HOOK, batch_size=4096, **held_out) as loader:
        batches = [(batch.x, batch.row_ids) for batch in loader]
    x, truth = torch.cat([b[0] for b in batches]), activations[torch.cat([b[1] for b in batches]).numpy()]
    sae.eval()
    out = sae(x)
    evaluator = Evaluator(sae.d_out, sae.config.d_sae)
    evaluator.update(out.x, out.x_hat, out.codes)
    W_dec = sae.W_dec.numpy()
    similarity = metrics.cosines(W_dec, world.directions)
    latent_of = metrics.match(similarity)
    scale = sae.scalings()[0].scale.mean().item()  # codes are in units of the normalized rows
    codes = out.codes.dense().numpy() / scale
    contribution = (codes * np.linalg.norm(W_dec, axis=1))[:, latent_of]
    contribution[:, latent_of < 0] = 0.0
    projections = codes @ W_dec @ world.directions.T
    active, fires = truth > 0, contribution > 0
    shared = evaluator.result()
    return {
        "mcc": metrics.mcc(similarity, latent_of),
        "f1": metrics.f1(active, fires),
        "fvu": shared["fvu"],
        "l0": shared["l0"],
        "rare": shared["rare"],
        "activation_ratio": metrics.activation_ratio(truth, contribution),
        "l2_ratio": metrics.l2_ratio(x.numpy(), out.x_hat.numpy(), active),
        "absorption": metrics.absorption(active, fires, world.parent),
        "carried": metrics.carried(truth, fires, projections, world.parent),
        "missed_alone": metrics.missed_alone(active, fires, world.parent),
    }
