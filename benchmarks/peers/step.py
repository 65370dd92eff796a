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
from sae_granary.common.process import keep_freed_memory

TYPES = ("topk", "batchtopk", "matryoshka", "vanilla", "gated", "jumprelu")


def table(args: argparse.Namespace) -> str:
    lines = [line for kind in args.types for line in lines_of(kind, args)]
    d_in, source = rows(args).shape[1], args.cache or "synthetic mixtures"
    title = (
        f"d_in {d_in}, d_sae {args.d_sae}, k {args.k}, batch {args.batch_size}, fp32 on {args.device}; rows: {source}."
    )
    header = ["type", "trainer", "ms per step", "encoder products", "times ours", "peak MiB"]
    return f"{title}\n\n{markdown(header, lines)}"


def lines_of(kind: str, args: argparse.Namespace) -> list[list[str]]:
    """A line for the product, ours and each peer; the processes of all types at once would not fit the memory."""
    trainers = contestants(kind)
    runs: dict[str, Contestant] = {"product": partial(product, args)}
    seconds = apart(runs | {name: partial(train, each, args) for name, each in trainers.items()}, args.repeats)
    lines = [[kind, "(encoder product)", f"{seconds['product'] * 1e3:.0f}", "1.00", "", ""]]
    for name in trainers:
        memory = "" if args.no_memory else f"{memory_of(kind, name, args) / 2**20:.0f}"
        against = "" if name == "ours" else f"{seconds[name] / seconds['ours']:.1f}"
        cost = [f"{seconds[name] * 1e3:.0f}", f"{seconds[name] / seconds['product']:.2f}"]
        lines.append([kind, name, *cost, against, memory])
    return lines


def product(args: argparse.Namespace, turn: Turn) -> None:
    """The encoder product, over and over, at its best."""
    keep_freed_memory()
    x = rows(args)
    W_enc, b_enc = torch.randn(args.d_sae, x.shape[1], device=x.device).t(), torch.zeros(args.d_sae, device=x.device)
    repeat(lambda: torch.addmm(b_enc, x, W_enc), turn)


def train(trainer: Trainer, args: argparse.Namespace, turn: Turn) -> None:
    if args.keep_freed:
        keep_freed_memory()
    trainer(rows(args), args, turn)
