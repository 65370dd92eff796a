"""`python -m benchmarks.cuda_visit.part module:function DEVICE FOLDER`: one part of the visit, in this process.

Tables go to standard output, messages to standard error. Exit code 3: a check failed.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "true"}

CHECKS_FAILED = 3


def main() -> int:
    """Run it."""
    from benchmarks.cuda_visit.place import Place

    target, device, folder = sys.argv[1:]
    module, function = target.split(":")
    return 0 if getattr(import_module(module), function)(Place(device, Path(folder))) else CHECKS_FAILED


def tell(message: str) -> None:
    """A line of progress."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
