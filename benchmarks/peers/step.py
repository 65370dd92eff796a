"""Step time and peak memory of SAELens, dictionary_learning and sparsify beside ours and the encoder product.

Steps are interleaved and the medians compared. No latent is dead, so AuxK costs nothing anywhere.
"""

import argparse

import torch

from benchmarks.peers.contest import Step
from benchmarks.peers.contestants import contestants
from benchmarks.peers.memory import memory_of
from benchmarks.peers.rows import rows
from benchmarks.table import markdown
from benchmarks.timing import interleaved
from train.heap import keep_freed_memory

TYPES = ("topk", "batchtopk", "matryoshka", "vanilla", "gated", "jumprelu")


def table(args: argparse.Namespace) -> str:
    """Measure everything and return the table."""
    keep_freed_memory()  # as our trainer does; the peers gain by it here too
    x = rows(args)
    d_in, F = x.shape[1], args.d_sae
    W_enc, b_enc = torch.randn(F, d_in, device=x.device).t(), torch.zeros(F, device=x.device)
    makers = contestants(args)
    steps: dict[str, Step] = {"product": lambda: torch.addmm(b_enc, x, W_enc)}
    for name, maker in makers.items():
        steps[name] = maker(x, args)
    seconds = interleaved(steps, args.repeats)
    product = seconds.pop("product")
    lines = [["", "encoder product", f"{product * 1e3:.0f}", "1.00", "", ""]]
    for name, time in seconds.items():
        kind, trainer = name.split(" ", 1)
        faster = time / seconds[f"{kind} ours"]
        memory = "" if args.no_memory else f"{memory_of(name, args) / 2**20:.0f}"
        against = "" if trainer == "ours" else f"{faster:.1f}"
        lines.append([kind, trainer, f"{time * 1e3:.0f}", f"{time / product:.2f}", against, memory])
    source = args.cache or "synthetic mixtures"
    title = f"d_in {d_in}, d_sae {F}, k {args.k}, batch {len(x)}, fp32 on {args.device}; rows: {source}."
    header = ["type", "trainer", "ms per step", "encoder products", "times ours", "peak MiB"]
    return f"{title}\n\n{markdown(header, lines)}"
