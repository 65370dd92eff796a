"""`python -m benchmarks [harvest] [writer] [loader] [step] [sweep] [--full]`: print the tables."""

import argparse
import os

from sae_granary.common.process import SPIN_COUNT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # before torch is loaded, as the commands do

from benchmarks import harvest_speed, loader_speed, machine, step_speed, sweep, writer_speed

STAGES = {
    "harvest": harvest_speed.run,
    "writer": writer_speed.run,
    "loader": loader_speed.run,
    "step": step_speed.run,
    "sweep": sweep.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], help="default: all")
    parser.add_argument("--full", action="store_true", help="the sizes of RESULTS.md (minutes instead of one)")
    arguments = parser.parse_args()
    print(machine.describe())
    for name in arguments.stages or STAGES:
        print(f"\n{STAGES[name](quick=not arguments.full)}", flush=True)


if __name__ == "__main__":
    main()
