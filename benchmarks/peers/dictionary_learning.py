"""dictionary_learning's step: trainer.update."""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.apart import Turn
from benchmarks.peers.contest import SHARES, repeat

PAST_WARM_UP = 3000  # the step given: thresholds are updated from 1000 on


def dictionary_learning_steps(kind: str, x: Tensor, args: argparse.Namespace, turn: Turn) -> None:
    """Steps of dictionary_learning's trainer, the penalised ones with the paper's recipe that ours follow."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

    assert trainers
    cls: Any = {
        "topk": top_k.TopKTrainer,
        "batchtopk": batch_top_k.BatchTopKTrainer,
        "matryoshka": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
        "vanilla": standard.StandardTrainerAprilUpdate,
        "gated": gdm.GatedSAETrainer,
        "jumprelu": jumprelu.JumpReluTrainer,
    }[kind]
    options: dict[str, Any] = {"k": args.k} if "topk" in kind or kind == "matryoshka" else {}
    if kind == "matryoshka":
        options["group_fractions"] = list(SHARES)
    trainer = cls(
        steps=10**6,
        activation_dim=x.shape[1],
        dict_size=args.d_sae,
        layer=0,
        lm_name="rows",
        device=args.device,
        **options,
    )

    def step() -> None:  # as their training loop calls it with autocast_dtype
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=args.autocast):
            trainer.update(PAST_WARM_UP, x)

    repeat(step, turn)
