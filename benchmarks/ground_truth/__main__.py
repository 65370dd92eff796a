"""`python -m benchmarks.ground_truth [--quick] [WORLD ...] [--types TYPE ...] [--steps N]`: print the tables."""

import argparse
import os
import time
from collections import defaultdict
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes

from benchmarks import machine
from benchmarks.ground_truth import suite
from benchmarks.ground_truth.generators import WORLDS


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ground_truth", description=__doc__)
    parser.add_argument("worlds", nargs="*", choices=[[], *WORLDS], help="default: all")
    parser.add_argument("--quick", action="store_true", help="one seed, short runs: shows that it runs, proves nothing")
    parser.add_argument("--types", nargs="+", choices=list(suite.TYPES), default=list(suite.TYPES))
    parser.add_argument("--steps", type=int, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, help="seeds of each world")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    size, worlds = suite.Size.of(quick=arguments.quick), arguments.worlds or list(WORLDS)
    size = replace(size, steps=arguments.steps or size.steps)
    if arguments.seeds:
        size = replace(size, seeds=dict.fromkeys(WORLDS, arguments.seeds))
    start, results = time.perf_counter(), defaultdict(list)
    print(machine.describe(), flush=True)
    for cell, numbers in suite.run(size, worlds, arguments.types, arguments.processes):
        results[cell.world].append(numbers)
        if len(results[cell.world]) == size.seeds[cell.world]:
            print(f"\n{suite.table(cell.world, results[cell.world])}", flush=True)
            if cell.world == "tree":
                print(f"\n{suite.per_seed(results[cell.world], 'absorption')}", flush=True)
    if {"vanilla", "topk", "batchtopk", "matryoshka"} <= set(arguments.types):
        print(f"\n{suite.claims(results)}")
    print(f"\n{size.steps} steps per run, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
