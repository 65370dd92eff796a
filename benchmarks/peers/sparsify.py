"""sparsify's step: Trainer.fit over a model whose hooked module returns the rows."""

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Embedding

from benchmarks.apart import Turn

N_STEPS = 10_000  # more than are ever taken


def sparsify_steps(optimizer: str, x: Tensor, args: argparse.Namespace, turn: Turn) -> None:
    """Steps of sparsify's Trainer.fit, which come to the model's forward pass one after the other."""
    if args.device == "cpu":  # its Triton kernel needs a GPU, and is taken wherever Triton is installed
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from datasets import Dataset
    from sparsify import SaeConfig, Trainer
    from sparsify import TrainConfig as SparsifyConfig

    before_step: list[Turn] = []  # none while the constructor finds the widths by a forward pass
    model = rows_model(x, lambda: [wait() for wait in before_step])
    dataset = Dataset.from_dict({"input_ids": [list(range(len(x)))] * 8}).with_format("torch")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        config = SparsifyConfig(
            SaeConfig(num_latents=args.d_sae, k=args.k),
            batch_size=1,
            optimizer=optimizer,  # type: ignore[arg-type]
            hookpoints=["rows"],
            save_every=10**9,
            log_to_wandb=False,
            save_dir=tempfile.gettempdir(),
        )
        trainer = Trainer(config, dataset.select([0] * N_STEPS), model)
        before_step.append(turn)
        trainer.fit()


def rows_model(x: Tensor, before: Callable[[], object]) -> Any:
    """A model of one embedding whose weights are the rows."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Rows(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self) -> None:
            super().__init__(PretrainedConfig())
            self.rows = Embedding.from_pretrained(x)

        @property
        def dummy_inputs(self) -> dict[str, Tensor]:
            return {"input_ids": x.new_zeros(1, 1).long()}

        def forward(self, input_ids: Tensor) -> Tensor:
            before()
            return self.rows(input_ids)

    return Rows().to(x.device)
