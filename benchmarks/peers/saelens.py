"""SAELens' step: SAETrainer.step."""

import argparse
from typing import Any

from torch import Tensor

from benchmarks.apart import Turn
from benchmarks.peers.contest import SHARES, repeat


def saelens_steps(kind: str, x: Tensor, args: argparse.Namespace, turn: Turn) -> None:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK"}.get(kind)
    name = name or {"vanilla": "Standard", "gated": "Gated", "jumprelu": "JumpReLU"}[kind]
    options: dict[str, Any] = {"k": args.k} if "TopK" in name else {}
    if kind == "matryoshka":
        options["matryoshka_widths"] = [round(sum(SHARES[: i + 1]) * args.d_sae) for i in range(len(SHARES))]
    if kind == "jumprelu":
        options |= {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 2.0, "pre_act_loss_coefficient": 3e-6}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")
    sae = getattr(sae_lens, f"{name}TrainingSAE")(
        config(d_in=x.shape[1], d_sae=args.d_sae, device=args.device, **options)
    )
    settings = SAETrainerConfig(10**9, args.batch_size, lr_end=3e-5, device=args.device, autocast=args.autocast)
    trainer = SAETrainer(settings, sae, iter(()))
    repeat(lambda: trainer.step(x), turn)
