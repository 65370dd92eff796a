"""The script for a machine with a GPU: all but the GPU, on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cuda_visit import agreement, products, roofline, speed
from benchmarks.cuda_visit.roofline import Limits, Size
from sae_granary.sae_core import Pattern

ROOT = Path(__file__).parent.parent
TINY = products.Case("tiny", Pattern.fixed_k(torch.tensor([[0, 3], [3, 3], [1, 0]]), 4), 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so_and_needs_no_zarr() -> None:
    absent = ("zarr", "yaml", "typer", "pyarrow", "xxhash", "transformers", "datasets")
    code = (
        f"import sys, runpy\nsys.modules.update(dict.fromkeys({absent!r}))\nsys.argv = ['cuda_visit']\n"
        "runpy.run_module('benchmarks.cuda_visit', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines() == ["no CUDA device: nothing was checked or timed"]


def test_products_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    passed, table = products.check("cpu", ["eager"], [TINY])
    assert passed, table
    assert "NO" not in table
    monkeypatch.setattr(products, "sampled_dot", lambda *inputs: torch.ones(6))
    passed, _ = products.check("cpu", ["eager"], [TINY])
    assert not passed


def test_steps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    passed, table = agreement.check("cpu", ["eager"], ["topk", "vanilla"])
    assert passed, table
    monkeypatch.setattr(agreement, "BOUND", -1.0)
    passed, table = agreement.check("cpu", ["eager"], ["topk"])
    assert not passed
    assert "NO" in table


def test_the_roofline_adds_the_product_and_the_bytes() -> None:
    # d_in 2, d_sae 3, k 1, batch 5: matrices of 24 bytes, 16 of them moved; 4 gathers of 40 bytes
    assert Limits(product_ms=1.0, bytes_per_ms=100.0).step_ms(Size(2, 3, 1, 5)) == pytest.approx(1.0 + 5.44)


def test_parts_and_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Size(16, 256, 4, 64)
    measure = roofline.measure
    monkeypatch.setattr(roofline, "measure", lambda size, device: measure(size, device, 2**12))
    monkeypatch.setattr(speed, "SIZES", [size])
    monkeypatch.setattr(speed, "one_hook_types", lambda: ["topk", "vanilla"])
    text = speed.measure(size, "cpu", ["eager"])
    assert "row_topk" in text
    assert "gradient of the codes" in text
    assert "| topk " in text
    assert "| vanilla " in text
