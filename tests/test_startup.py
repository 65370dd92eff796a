"""What a user waits for before and after the work: imports, and counting for a threshold."""

import subprocess
import sys

import pytest
import torch

from sae_granary.sae_core.latents import DROPPED_BITS, N_BINS, _bins


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_positive_numbers_are_counted_by_their_bits(dtype: torch.dtype) -> None:
    values = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:4] = torch.tensor([0.0, -0.0, 1e-44, torch.inf], dtype=dtype)[:, None]
    positive = values[values > 0].float()
    expected = torch.bincount(positive.view(torch.int32) >> DROPPED_BITS, minlength=N_BINS)
    assert torch.equal(_bins(values), expected)
    assert torch.equal(_bins(values.t()), expected)


def test_training_does_not_import_the_compiler(make_cache, tmp_path) -> None:
    """torch._dynamo takes seconds, and torch.optim imports it unless it is kept from doing so."""
    script = f"""
import sys
from sae_granary import train_sae
train_sae(cache={str(make_cache())!r}, type="batchtopk", k=4, d_sae=64, steps=2, batch_size=64, device="cpu",
          runs_dir={str(tmp_path / "runs")!r})
heavy = ("torch._dynamo", "sympy", "transformers", "datasets", "scipy", "sklearn", "pandas", "matplotlib", "zarr")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
