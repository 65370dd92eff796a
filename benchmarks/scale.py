"""`python -m benchmarks.scale [--price 3.00]`: bytes, shards, metadata, hours and cost from 10^8 to 10^12 tokens.

Computed, not measured: one hook point of width 768 in bfloat16, and throughputs of one H200 (2026-11-28).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.table import markdown
from sae_granary.cache.format.layout import cache_layout, default_rows_per_shard
from sae_granary.common.rows import HookPoint

TOKENS = tuple(10**n for n in range(8, 13))
D_IN, DTYPE = 768, "bfloat16"
HARVEST = 205_000  # tokens per second: BERT-base layer 6, writing included
TRAINING = 547_000  # rows per second: topk, d_sae 24,576, batch 8,192, by `sae-train run`
PRICE = 3.00  # of an hour of one GPU, an assumption
RECORD_BYTES = 1309  # of a shard in the manifest
COUNTED_BYTES = 9  # of a row: flags and doc_id, which default filters and held-out documents need
FILES = 10  # of a shard


@dataclass(frozen=True)
class Scale:
    """What a number of tokens takes."""

    tokens: int
    n_bytes: int
    shards: int
    manifest_bytes: int
    counted_bytes: int
    harvest_hours: float
    training_hours: float


def scale(tokens: int, shard_bytes: int) -> Scale:
    """What this many tokens take; documents are not counted."""
    rows = default_rows_per_shard(D_IN, DTYPE, shard_bytes)
    layout = cache_layout([HookPoint("layer_6", "encoder.layer.6", "output", 0, D_IN)], DTYPE, rows)
    shards = -(-tokens // rows)
    hours = tokens / HARVEST / 3600, tokens / TRAINING / 3600
    return Scale(tokens, layout.bytes_of(tokens), shards, shards * RECORD_BYTES, tokens * COUNTED_BYTES, *hours)


def rows_of_table(price: float, shard_bytes: int) -> list[list[str]]:
    rows = []
    for s in (scale(tokens, shard_bytes) for tokens in TOKENS):
        hours = [s.harvest_hours, s.training_hours]
        numbers = [
            f"{s.n_bytes / 1e12:,.2f}",
            f"{s.shards:,}",
            f"{s.shards * FILES:,}",
            f"{s.manifest_bytes / 1e6:,.1f}",
        ]
        cost = [f"{h:,.1f}" for h in hours] + [f"{sum(hours) * price:,.0f}"]
        rows.append([f"10^{len(str(s.tokens)) - 1}", *numbers, f"{s.counted_bytes / 1e9:,.1f}", *cost])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__)
    parser.add_argument("--price", type=float, default=PRICE, help="of an hour of one GPU")
    parser.add_argument("--shard-mib", type=int, default=512, help="of activations in a shard")
    given = parser.parse_args()
    head = ["tokens", "TB", "shards", "files", "manifest MB", "counted GB", "harvest h", "training h", "cost"]
    print(markdown(head, rows_of_table(given.price, given.shard_mib << 20)))


if __name__ == "__main__":
    main()
