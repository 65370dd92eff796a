"""`python -m benchmarks.cuda_visit [--quick]`: check the CUDA kernels, then print tables for RESULTS.md.

Imports no zarr: torch and the models are enough. Exit code 0: all checks passed; 1: one failed; 2: there is no CUDA.
"""

import argparse
import sys

import torch

from benchmarks import machine
from benchmarks.cuda_visit import agreement, products, speed
from sae_granary.sae_core.kernels.choice import triton_installed


def main() -> int:
    """Checks first: a fast kernel that is wrong is not fast."""
    parser = argparse.ArgumentParser(prog="benchmarks.cuda_visit", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest size only")
    parser.add_argument("--only", choices=["checks", "times"], help="one of the two halves")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or timed")
        return 2
    kernels = ["eager", "triton"] if triton_installed() else ["eager"]
    print(f"{machine.describe()}, {_triton_version()}\n", flush=True)
    passed = True
    if arguments.only != "times":
        for stage in (products.check, agreement.check):
            stage_passed, text = stage("cuda", kernels)
            passed &= stage_passed
            print(f"{text}\n", flush=True)
    if arguments.only != "checks":
        for size in speed.SIZES[: 1 if arguments.quick else None]:
            print(f"{speed.measure(size, 'cuda', kernels)}\n", flush=True)
    print("all checks passed" if passed else "CHECKS FAILED, see the tables")
    return 0 if passed else 1


def _triton_version() -> str:
    if not triton_installed():
        return "no Triton"
    import triton

    return f"Triton {triton.__version__}"


if __name__ == "__main__":
    sys.exit(main())
