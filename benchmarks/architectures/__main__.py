"""`python -m benchmarks.architectures [NAME ...] [--jobs N]`: write the table, or print the lines of some."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks/ARCHITECTURES.md"
Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    arguments = parser.parse_args()
    if arguments.names:
        from benchmarks.architectures.trial import quiet, try_one

        quiet()
        for name in arguments.names:
            print(json.dumps({"name": name} | try_one(name, debug=arguments.debug)), flush=True)
        return
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    from benchmarks.architectures.table import summary, table

    start = time.monotonic()
    found = list(all_lines(sorted(MODEL_MAPPING_NAMES), arguments.jobs))
    TABLE.write_text(table(found), encoding="utf-8")
    print(f"{summary(found)}; {time.monotonic() - start:.0f} s; {TABLE}")
    if any(line["outcome"] in ("WRONG", "TRACEBACK") for line in found):
        sys.exit(1)


def all_lines(names: Sequence[str], jobs: int) -> Iterator[Line]:
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(_in_process, [names[i::jobs] for i in range(jobs)])
        known = {line["name"]: line for lines in parts for line in lines}
    return (known[name] for name in names)


def _in_process(names: Sequence[str]) -> list[Line]:
    """The lines of some architectures from one process; one that kills its process has a line too."""
    found: list[Line] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    while left := names[len(found) :]:
        command = [sys.executable, "-m", "benchmarks.architectures", *left]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for text in process.stdout:
                if text.startswith("{"):
                    found.append(json.loads(text))
        if len(found) < len(names):
            found.append(
                {"name": names[len(found)], "outcome": "TRACEBACK", "why": f"its process ended: {process.returncode}"}
            )
    return found


if __name__ == "__main__":
    main()
