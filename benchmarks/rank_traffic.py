"""What the ranks of a training send in a step, beside what they compute.

`python -m benchmarks.rank_traffic` prints the rows of the tables in docs/clusters.md; `tests/test_rank_bytes.py` counts
the bytes of two gloo ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT, COUNT = 4, 8  # bytes of a gradient's entry, and of a counter
NVLINK, ETHERNET = 450e9, 12.5e9  # bytes per second in one direction: NVLink 4 of a card; 100 Gb Ethernet of a host

# model, d_in, d_sae, k, rows of a batch: the rows of the table in docs/clusters.md
SIZES = (
    ("gpt2", 768, 24_576, 32, 4_096),
    ("8B", 4_096, 131_072, 64, 16_384),
    ("70B", 8_192, 1_048_576, 128, 65_536),
)


@dataclass(frozen=True)
class Traffic:
    """One step of one rank of n that share the batches of an SAE."""

    sent: float  # bytes that the rank sends, and as many that it receives
    flop: float  # of its products: encoder, decoder, and their gradients

    def seconds(self, bytes_per_second: float) -> float:
        """The least time of sending at a bandwidth; latency and overlap with computing are not counted."""
        return self.sent / bytes_per_second


def step_traffic(d_in: int, d_sae: int, k: int, batch_size: int, n: int, *, batchwise: bool = False) -> Traffic:
    """Bytes and products of a step of topk, or of batchtopk (`batchwise`), with rows divided over n ranks.

    all_reduce on a ring sends 2 (n - 1) / n of its data: all gradients (2 d_in d_sae + d_sae + d_in numbers) and
    counters of d_sae latents. batchtopk also gathers about k values for each row of the other ranks.
    The encoder's product takes 2 d_in d_sae operations for each row. The other three (decoder, and the gradients of
    both matrices; the decoder's needs two) touch k latents for each row.
    """
    rows = batch_size / n
    numbers = 2 * d_in * d_sae + d_sae + d_in
    reduced = 2 * (n - 1) / n * (numbers * FLOAT + d_sae * COUNT)
    gathered = (n - 1) * rows * k * FLOAT if batchwise else 0.0
    return Traffic(reduced + gathered, rows * (2 * d_in * d_sae + 4 * 2 * k * d_in))


def shard_traffic(d_in: int, d_sae: int, k: int, batch_size: int, n: int, *, auxk: bool = False) -> Traffic:
    """Bytes and products of a step of topk whose latents are divided over n ranks (`--shard-latents`).

    Each rank sends its k candidates of each row to all others, and adds up the reconstructions (batch_size, d_in) and
    the gradient of b_dec with them. `auxk`: while more latents than k_aux = d_in / 2 are dead, the same again with
    k_aux candidates. The gradients of the matrices stay where they are.
    """
    gathered = (n - 1) * batch_size * (k + (d_in // 2 if auxk else 0)) * FLOAT
    reduced = 2 * (n - 1) / n * ((1 + auxk) * batch_size * d_in + d_in) * FLOAT
    return Traffic(gathered + reduced, batch_size * (2 * d_in * d_sae + 4 * 2 * k * d_in) / n)


def training_bytes(d_in: int, d_sae: int, n: int = 1) -> int:
    """Bytes of weights, gradients and Adam's moments that each of n ranks holds of divided latents."""
    return 4 * FLOAT * ((2 * d_in + 1) * d_sae // n + d_in)


def table_row(model: str, d_in: int, d_sae: int, k: int, batch_size: int) -> str:
    """One row of the table: eight ranks."""
    step = step_traffic(d_in, d_sae, k, batch_size, 8)
    sizes = f"| {model} | {d_in:,} | {d_sae:,} | {batch_size:,} | {step.sent / 2**20:,.0f} MiB "
    times = f"| {1e3 * step.seconds(NVLINK):,.1f} ms | {1e3 * step.seconds(ETHERNET):,.0f} ms "
    return f"{sizes}{times}| {step.flop / 1e12:,.2f} |"


def shard_row(model: str, d_in: int, d_sae: int, k: int, batch_size: int) -> str:
    """One row of the table of divided latents: eight ranks."""
    step, most = (shard_traffic(d_in, d_sae, k, batch_size, 8, auxk=auxk) for auxk in (False, True))
    sent = f"| {model} | {step.sent / 2**20:,.0f} MiB | {most.sent / 2**20:,.0f} MiB "
    times = f"| {1e3 * step.seconds(NVLINK):,.2f} ms | {1e3 * step.seconds(ETHERNET):,.0f} ms "
    return (
        f"{sent}{times}| {training_bytes(d_in, d_sae) / 2**30:,.1f} | {training_bytes(d_in, d_sae, 8) / 2**30:,.1f} |"
    )


if __name__ == "__main__":
    print(*(row(*size) for row in (table_row, shard_row) for size in SIZES), sep="\n")
