"""Our step: sae_granary.train.loop.train_step, with its checks and its clipping.

Types with a penalty start at trained density (biases set so that about 64 latents fire, and a learning rate that keeps
them there): their cost depends on it, a dense peer's does not.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.apart import Turn
from benchmarks.peers.contest import repeat
from sae_granary.common.process import keep_freed_memory
from sae_granary.sae_core import make_config, registry
from sae_granary.train.config.settings import TrainConfig
from sae_granary.train.loop import train_step
from sae_granary.train.state.run_state import Run
from sae_granary.train.step_input import RowInput

TRAINED_L0 = 64


def our_steps(kind: str, x: Tensor, args: argparse.Namespace, turn: Turn) -> None:
    torch.set_flush_denormal(True)  # the process as a training sets it
    if args.device == "cpu":
        keep_freed_memory()
    cls = registry.get(kind)
    options: dict[str, Any] = {"d_in": x.shape[1], "d_sae": args.d_sae}
    sparse = hasattr(cls.Config, "k")
    if sparse:
        options["k"] = args.k
    sae = cls(make_config(cls, options)).to(x.device)
    sae.initialize(x, torch.Generator(device=x.device).manual_seed(0))
    if not sparse:
        with torch.no_grad():
            pre_acts = sae.pre_acts(sae.encoder_input(x)).dense
            sae.encoder_bias.sub_(pre_acts.flatten()[::97].quantile(1 - TRAINED_L0 / args.d_sae))
    lr, dtype = 2e-4 if sparse else 1e-12, "bfloat16" if args.autocast else "float32"
    config = TrainConfig(
        type=kind, device=args.device, compute_dtype=dtype, steps=10**6, lr=lr, warmup_steps=0, options=options
    )
    run = Run.create(config, sae)
    repeat(lambda: train_step(run, RowInput({"x": x})), turn)
