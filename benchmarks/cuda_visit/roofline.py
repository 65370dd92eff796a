"""The least time of a step: the encoder product and the bytes that must be moved, at the rates measured here."""

from dataclasses import dataclass

import torch

from benchmarks.cuda_visit.clock import median_ms


@dataclass(frozen=True)
class Size:
    """d_in, d_sae, active latents per row, rows per step."""

    d_in: int
    d_sae: int
    k: int
    batch: int

    @property
    def matrix_bytes(self) -> int:
        """A float32 matrix of the shape of W_enc."""
        return 4 * self.d_in * self.d_sae

    @property
    def gather_bytes(self) -> int:
        """One row of a float32 matrix for every active latent."""
        return 4 * self.batch * self.k * self.d_in


@dataclass(frozen=True)
class Limits:
    """Measured rates, and what follows for a step."""

    product_ms: float  # encoder product in bfloat16
    bytes_per_ms: float  # a copy: read and written

    def ms(self, n_bytes: int) -> float:
        """Milliseconds for moving bytes."""
        return n_bytes / self.bytes_per_ms

    def step_ms(self, size: Size) -> float:
        """Product, Adam (p, g, m, v read; p, m, v written), two gradients written, four gathers.

        The gathers: decoding, the gradient of the codes, of W_dec and of W_enc.
        """
        moved = 2 * 7 * size.matrix_bytes + 2 * size.matrix_bytes + 4 * size.gather_bytes
        return self.product_ms + self.ms(moved)


def measure(size: Size, device: str, copied_bytes: int = 2**30) -> Limits:
    """Time the product and a copy."""
    x = torch.randn(size.batch, size.d_in, device=device).bfloat16()
    W_enc = torch.randn(size.d_sae, size.d_in, device=device).bfloat16().t()
    out = torch.empty(size.batch, size.d_sae, dtype=torch.bfloat16, device=device)
    product_ms = median_ms(lambda: torch.mm(x, W_enc, out=out), device)
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device)
    return Limits(product_ms, 2 * copied_bytes / copy_ms)
