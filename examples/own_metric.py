"""Log your own metric, and add your own file to checkpoints: python examples/own_metric.py [CACHE]"""

import json
import sys
from pathlib import Path

import torch

from sae_granary import train_sae
from sae_granary.train.callbacks import Callback, StepEvent

CACHE = sys.argv[1] if len(sys.argv) > 1 else "cache/demo_l3"


class Drift(Callback):
    """How far the decoder has turned since the first step: mean cosine of its rows to what they were."""

    def __init__(self) -> None:
        self.start: torch.Tensor | None = None

    def on_step(self, event: StepEvent) -> dict[str, float] | None:
        """Return what goes to metrics.jsonl, wandb and the other sinks with the metrics of this step."""
        decoder = event.sae.core.W_dec.detach()
        if self.start is None:
            self.start = decoder.clone()
        if event.step % 10:
            return None
        return {"mine/decoder_cosine": float(torch.cosine_similarity(decoder, self.start, dim=1).mean())}

    def on_checkpoint(self, folder: Path, step: int) -> None:
        """Add a file to a checkpoint."""
        (folder / "note.txt").write_text(f"step {step}\n")


result = train_sae(
    cache=CACHE,
    type="topk",
    k=8,
    steps=50,
    batch_size=1024,
    name="own_metric",
    overwrite=True,
    callbacks=[Drift()],
)
for line in (result.folder / "metrics.jsonl").read_text().splitlines():
    metrics = json.loads(line)
    if "mine/decoder_cosine" in metrics:
        print(metrics["step"], metrics["fvu"], metrics["mine/decoder_cosine"])
