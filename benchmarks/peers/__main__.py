"""Speed beside the peers, each called as its users call it: `make bench-peers ARGS="[step] [loader] [options]"`.

make bench-peers                                      both tables
make bench-peers ARGS="loader --rows 1048576"         the loader alone
make bench-peers ARGS="step --types topk jumprelu"    d_in 384, d_sae 12288, k 32, batch 2048, fp32
make bench-peers ARGS="step --cache cache/demo_l3"    on a cache's rows instead of synthetic ones
"""

import argparse
import os

os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # for the contestants' processes too
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import machine
from benchmarks.peers import loader, memory, step

STAGES = {"step": step.table, "loader": loader.table}


def main() -> None:
    """Print the tables, or with --memory-of the peak memory of one contestant."""
    args = parse_args()
    if args.memory_of:
        print(memory.peak_bytes(*args.memory_of, args))
        return
    print(machine.describe())
    for name in args.stages or STAGES:
        print(f"\n{STAGES[name](args)}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], help="default: all")
    parser.add_argument("--d-in", type=int, default=384, help="ignored by step with --cache")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16; sparsify decides for itself")
    parser.add_argument("--keep-freed", action="store_true", help="lend the peers our trainer's setting of malloc")
    steps = parser.add_argument_group("step")
    steps.add_argument("--d-sae", type=int, default=12_288)
    steps.add_argument("--k", type=int, default=32)
    steps.add_argument("--batch-size", type=int, default=2048)
    steps.add_argument("--cache", help="take the rows of a cache with one hook point")
    steps.add_argument("--types", nargs="+", default=list(step.TYPES), choices=step.TYPES)
    steps.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    steps.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    loaders = parser.add_argument_group("loader")
    loaders.add_argument("--rows", type=int, default=524_288, help="of the cache, in contexts of 128")
    loaders.add_argument("--whole", action="store_true", help="SAELens also with a buffer of the whole cache (slow)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
