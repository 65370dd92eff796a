"""`python -m benchmarks.cuda_visit [--minutes 14] [--parts NAMES]`: check and time everything on a CUDA GPU.

Each part runs in a process of its own with a limit, in the order of their worth; a part that fails or exceeds its limit
is reported, and the next one starts. Tables are appended to --out as they come. Weights are random, the text is
Python's own help, nothing is downloaded. What all parts take has not been measured yet: their limits (--list) add up to
25 minutes, those of `--parts first` and of `--parts second` to 7 each. Parts for which no time is left are listed as
not started; of a part that is stopped, the rows that it has printed are kept.

Needs the package's own dependencies; peers that are not installed are left out. `--device cpu` runs every part in a
tiny size, to test this script. Exit code 0: all parts were done and passed; 1: not all; 2: there is no CUDA device.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import FrameType

from benchmarks.cuda_visit.parts import PARTS, VISITS, chosen
from benchmarks.cuda_visit.place import CPU_PATIENCE, Place
from benchmarks.cuda_visit.visit import Visit

ROOMY = 16 * 2**30  # bytes free in memory's own file system for caches to be written there


def main() -> int:
    """Carry out the chosen parts."""
    arguments = parse_args()
    if arguments.list:
        for name, parts in VISITS.items():
            print(f"--parts {name}: {sum(part.limit for part in parts):.0f} s")
            for part in parts:
                print(f"  {part.name:16}{part.limit:5.0f} s  {part.about}")
        return 0
    import torch

    from benchmarks import machine

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or timed")
        return 2
    signal.signal(signal.SIGTERM, _leave)
    patience = CPU_PATIENCE if arguments.device == "cpu" else 1
    wanted = [replace(part, limit=patience * part.limit) for part in chosen(arguments.parts)]
    with tempfile.TemporaryDirectory(prefix="cuda_visit_", dir=_roomy_folder()) as folder:
        title = f"{machine.describe()}, {_triton_version()}, {arguments.device}, files in {folder}"
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(f"\n# {title}\n")
        print(title, flush=True)
        visit = Visit(Place(arguments.device, Path(folder)), arguments.out, 60 * arguments.minutes, _say)
        return 0 if visit.carry_out(wanted) else 1


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.cuda_visit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*VISITS, *(part.name for part in PARTS)]
    parser.add_argument("--minutes", type=float, default=14.0, help="no part runs longer (default 14)")
    about = "these parts, or first, second, rest (default all): see --list"
    parser.add_argument("--parts", nargs="+", choices=names, metavar="NAME", help=about)
    parser.add_argument("--list", action="store_true", help="print the parts with their limits")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny sizes, a test")
    parser.add_argument("--out", type=Path, default=Path("cuda_visit.md"), help="file that the tables are appended to")
    return parser.parse_args()


def _roomy_folder() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > ROOMY else None


def _leave(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)  # the parts' processes are ended, the folder is removed


def _say(text: str) -> None:
    print(text, flush=True)


def _triton_version() -> str:
    from sae_granary.sae_core.kernels.choice import triton_installed

    if not triton_installed():
        return "no Triton"
    import triton

    return f"Triton {triton.__version__}"


if __name__ == "__main__":
    sys.exit(main())
