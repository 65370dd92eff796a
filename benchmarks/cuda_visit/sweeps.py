"""Sweeps of eight, plain and batched, against the sum of their steps alone, and one product for all encoders."""

import torch

from benchmarks import sweep
from benchmarks.cuda_visit.clock import median_ms
from benchmarks.cuda_visit.place import Place
from benchmarks.cuda_visit.storage import cache_of
from benchmarks.sweep import Size
from benchmarks.table import markdown

N_SAES = 8


def run(at: Place) -> bool:
    """A sweep, a batched one, and products."""
    d_in, size = (32, Size(128, 256, 20)) if at.tiny else (768, Size(12_288, 8192, 200))
    for batched in (False, True):
        print(f"{sweep.tables(cache_of(at), 200_000.0, size, at.device, batched=batched)}\n", flush=True)
    if not at.tiny:
        print(f"Peak memory, the steps alone included: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB.\n", flush=True)
    x = torch.randn(size.batch, d_in, device=at.device).bfloat16()
    together = torch.randn(N_SAES * size.d_sae, d_in, device=at.device).bfloat16()
    each = together.chunk(N_SAES)
    out = torch.empty(size.batch, N_SAES * size.d_sae, dtype=torch.bfloat16, device=at.device)
    outs = [torch.empty(size.batch, size.d_sae, dtype=torch.bfloat16, device=at.device) for _ in each]
    eight = median_ms(lambda: [torch.mm(x, W.t(), out=to) for W, to in zip(each, outs, strict=True)], at.device)
    one = median_ms(lambda: torch.mm(x, together.t(), out=out), at.device)
    rows = [[f"{N_SAES} products", f"{eight:.3f}", "1.00"], ["one product", f"{one:.3f}", f"{one / eight:.2f}"]]
    print(f"Encoders of {N_SAES} SAEs in bfloat16, d_in {d_in}, d_sae {size.d_sae}, batch {size.batch}.\n")
    print(markdown(["", "ms", "of the products"], rows))
    return True
