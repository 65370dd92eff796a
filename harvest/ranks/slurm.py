"""`sae-harvest script`: an sbatch file whose array of independent jobs fills one cache."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.sbatch import batch_script
from sae_granary.harvest.ranks.world import DEFAULT_BLOCK_DOCS

CPUS, WARNING = 8, 120  # cores of a job; seconds before the time limit: a block is released at once

NOTES = (
    "# Add --partition and --account as needed. The jobs share --out and need no other connection; each",
    "# may start late, end early or run again.",
    "",
    "# Where nodes have no internet, download model and text before, to a folder that all nodes see:",
    "# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1",
)


def sbatch_script(flags: Sequence[str], *, jobs: int, gpus: int, time: str) -> str:
    """Return the file for `sae-harvest run` with these flags in so many jobs. Raises ConfigError."""
    if not any(flag.partition("=")[0] in ("--out", "-o", "--config") for flag in flags):
        raise ConfigError("--out is missing: name the folder that all jobs share")
    blocks = any(flag.startswith("--block-docs") for flag in flags)
    command = ["sae-harvest", "run", *flags, *([] if blocks else ["--block-docs", str(DEFAULT_BLOCK_DOCS)])]
    options = {"job-name": "harvest", "array": f"0-{jobs - 1}", "ntasks": 1, "gpus-per-task": gpus or None}
    return batch_script({**options, "time": time}, cpus=CPUS, warning=WARNING, step=shlex.join(command), notes=NOTES)
