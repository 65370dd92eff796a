"""The kernels as a GPU gets them: compiled for an H100, which needs no GPU (`make kernels`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_kit  # noqa: F401

ROOT = Path(__file__).parent.parent
COMPILE = """
import json
from benchmarks.kernel_resources import compile_use, uses

for use in {repr(use): use for d_in in (768, 2048) for use in uses(d_in, 32)}.values():
    got = compile_use(use)
    print(json.dumps([use.kernel, *got, got.active_warps]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes with its Linux packages")
def test_no_kernel_spills_registers_and_the_product_uses_matrix_units(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does. Each must leave room for enough programs to hide waiting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"product", "sum_bags", "update_rows", "dot_at_entries"} <= {row[0] for row in rows}
    of_rows = {"sum_chunks", "sum_bags", "dot_at_entries", "square_rows", "add_rows", "update_rows"}
    of_rows |= {"round_rows", "round_latents"}
    for kernel, registers, _, spilled, _, uses_matrix_units, reads_16_bytes, active_warps in rows:
        assert spilled == 0, f"{kernel} spills {spilled} bytes at {registers} registers"
        assert uses_matrix_units == (kernel == "product"), kernel
        assert reads_16_bytes or kernel not in of_rows, kernel
        assert active_warps >= (8 if kernel == "product" else 24), kernel
