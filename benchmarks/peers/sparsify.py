"""sparsify's step: Trainer.fit over a model whose hooked module returns the rows."""

import argparse
import contextlib
import io
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.contest import Step


def sparsify_step(optimizer: str, x: Tensor, args: argparse.Namespace) -> Step:
    """One step of sparsify's Trainer.fit, which runs in a thread and is let through one forward pass at a time."""
    from datasets import Dataset
    from sparsify import SaeConfig, Trainer
    from sparsify import TrainConfig as SparsifyConfig

    gate = Gate()
    model = rows_model(x, gate)
    n_steps = 10_000
    dataset = Dataset.from_dict({"input_ids": [list(range(len(x)))] * 8}).with_format("torch")
    dataset = dataset.select([0] * n_steps)
    quiet = io.StringIO()  # its progress bar keeps the stream that it was made with
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        config = SparsifyConfig(
            SaeConfig(num_latents=args.d_sae, k=args.k),
            batch_size=1,
            optimizer=optimizer,  # type: ignore[arg-type]
            hookpoints=["rows"],
            save_every=10**9,
            log_to_wandb=False,
            save_dir=tempfile.gettempdir(),
        )
        gate.open = True  # the constructor's own forward pass, which finds the widths
        trainer = Trainer(config, dataset, model)
        gate.open = False
        gate.start(trainer.fit)
    return gate.step


def rows_model(x: Tensor, gate: "Gate") -> Any:
    """A model of one embedding whose weights are the rows."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Rows(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.rows = torch.nn.Embedding.from_pretrained(x)

        @property
        def dummy_inputs(self) -> dict[str, Tensor]:
            return {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

        def forward(self, input_ids: Tensor) -> Tensor:
            gate.wait()
            return self.rows(input_ids)

    return Rows().to(x.device)


class Gate:
    """Lets a training loop that runs in a thread take one step when told to, and no more."""

    def __init__(self) -> None:
        self.open = False
        self._go, self._arrived = threading.Semaphore(0), threading.Semaphore(0)

    def start(self, fit: Callable[[], object]) -> None:
        """Run `fit` up to its first forward pass."""
        threading.Thread(target=fit, daemon=True).start()
        self._arrived.acquire()

    def wait(self) -> None:
        """Called by the model: report arrival, wait to be let through."""
        if not self.open:
            self._arrived.release()
            self._go.acquire()

    def step(self) -> None:
        """Let one step through and wait for the next forward pass."""
        self._go.release()
        self._arrived.acquire()
