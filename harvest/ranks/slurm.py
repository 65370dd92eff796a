"""`sae-harvest script`: an sbatch file whose array of independent jobs fills one cache."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from sae_granary.common.errors import ConfigError
from sae_granary.harvest.ranks.world import DEFAULT_BLOCK_DOCS

_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=harvest
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --gpus-per-task={gpus}
#SBATCH --cpus-per-task=8
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Add --partition and --account as your cluster needs them. The jobs share --out and need no other connection; each may
# start late, end early or run again.

# Where nodes have no internet, download model and text before, to a folder that all nodes see:
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

srun {command} &
harvest=$!

# Two minutes before the time limit: release the block, which takes seconds, and queue this job again.
requeue() {{
    kill -TERM "$harvest"
    wait "$harvest"
    scontrol requeue "${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
    exit 0
}}
trap requeue USR1
trap 'kill -TERM "$harvest"; wait "$harvest"; exit 143' TERM
wait "$harvest"
"""


def sbatch_script(flags: Sequence[str], *, jobs: int, gpus: int, time: str) -> str:
    """Return the file for `sae-harvest run` with these flags in so many jobs. Raises ConfigError."""
    if not _TIME.fullmatch(time):
        raise ConfigError(f"--time {time}: expected a time as sbatch takes it, such as 04:00:00 or 1-00:00:00")
    if not any(flag.partition("=")[0] in ("--out", "-o", "--config") for flag in flags):
        raise ConfigError("--out is missing: name the folder that all jobs share")
    blocks = any(flag.startswith("--block-docs") for flag in flags)
    command = ["sae-harvest", "run", *flags, *([] if blocks else ["--block-docs", str(DEFAULT_BLOCK_DOCS)])]
    return _SCRIPT.format(last=jobs - 1, gpus=gpus, time=time, command=shlex.join(command))
