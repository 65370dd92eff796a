"""Step time and peak memory of SAELens, dictionary_learning and sparsify beside ours and the encoder product.

Each has a process of its own; they take their steps in turn and the medians are compared. No latent is dead, so AuxK
costs nothing anywhere.
"""

import argparse
from functools import partial

import torch

from benchmarks.apart import Contestant, Turn, apart
from benchmarks.peers.contest import Trainer, repeat
from benchmarks.peers.contestants import contestants
from benchmarks.peers.memory import memory_of
from benchmarks.peers.rows import rows
from benchmarks.table import markdown

TYPES = ("topk", "batchtopk", "matryoshka", "vanilla", "gated", "jumprelu")


def table(args: argparse.Namespace) -> str:
    """Measure everything and return the table."""
    runs: dict[str, Contestant] = {"product": partial(product, args)}
    runs |= {name: partial(train, trainer, args) for name, trainer in contestants(args).items()}
    seconds = apart(runs, args.repeats)
    product_seconds = seconds.pop("product")
    lines = [["", "encoder product", f"{product_seconds * 1e3:.0f}", "1.00", "", ""]]
    for name, time in seconds.items():
        kind, trainer = name.split(" ", 1)
        faster = time / seconds[f"{kind} ours"]
        memory = "" if args.no_memory else f"{memory_of(name, args) / 2**20:.0f}"
        against = "" if trainer == "ours" else f"{faster:.1f}"
        lines.append([kind, trainer, f"{time * 1e3:.0f}", f"{time / product_seconds:.2f}", against, memory])
    d_in, source = rows(args).shape[1], args.cache or "synthetic mixtures"
    title = (
        f"d_in {d_in}, d_sae {args.d_sae}, k {args.k}, batch {args.batch_size}, fp32 on {args.device}; rows: {source}."
    )
    header = ["type", "trainer", "ms per step", "encoder products", "times ours", "peak MiB"]
    return f"{title}\n\n{markdown(header, lines)}"


def product(args: argparse.Namespace, turn: Turn) -> None:
    """The encoder product, over and over."""
    x = rows(args)
    W_enc, b_enc = torch.randn(args.d_sae, x.shape[1], device=x.device).t(), torch.zeros(args.d_sae, device=x.device)
    repeat(lambda: torch.addmm(b_enc, x, W_enc), turn)


def train(trainer: Trainer, args: argparse.Namespace, turn: Turn) -> None:
    """A contestant on the rows."""
    trainer(rows(args), args, turn)
