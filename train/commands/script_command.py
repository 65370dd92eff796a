"""`sae-train script`: an sbatch file for SLURM that starts a training on all GPUs and continues it after each stop."""

from __future__ import annotations

import re
import shlex
from typing import Annotated

import typer

from sae_granary.common.app import Debug, echo
from sae_granary.common.errors import ConfigError
from sae_granary.train.commands.shared_flags import errors

COMMANDS = ("run", "sweep", "resume")
TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){1,2}|\d+")

TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={job}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
#SBATCH --requeue
#SBATCH --signal=B:USR1@{warning}
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
{partition}
# {warning} s before the time limit SLURM sends USR1: every rank stops after a checkpoint, and the job is queued again.
# The same command then continues the training. A preempted job (TERM) is stopped in the same way and requeued by SLURM.
set -u
export OMP_NUM_THREADS="${{SLURM_CPUS_PER_TASK:-{cpus}}}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
again=0
step=

stop() {{
    if [ -n "$step" ]; then kill -TERM "$step" 2>/dev/null; fi
}}
trap 'again=1; stop' USR1
trap stop TERM

srun --kill-on-bad-exit=1 torchrun --nnodes={nodes} --nproc-per-node={gpus} \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:29400" \\
    -m sae_granary.train {command} &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the training
    wait "$step"
    code=$?
done
if [ "$again" -eq 1 ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def script(
    command: Annotated[
        list[str], typer.Argument(help="What to train, after --: run, sweep or resume, with all flags.")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs of each machine; each gets a process.")] = 8,
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="CPU cores of each machine.")] = 32,
    time: Annotated[str, typer.Option("--time", help="Time limit, as SLURM writes it.")] = "04:00:00",
    warning: Annotated[
        int, typer.Option("--warning", min=30, help="Seconds before the limit at which the training is stopped.")
    ] = 180,
    partition: Annotated[str | None, typer.Option("--partition", help="Partition of the cluster.")] = None,
    job: Annotated[str, typer.Option("--job", help="Name of the job.")] = "sae-train",
    debug: Debug = False,
) -> None:
    """Print an sbatch file that trains on all GPUs of a SLURM job and continues after the time limit or a preemption.

    `sae-train script --nodes 2 --gpus 8 -- run --cache /shared/cache/gpt2_l8 --type topk > train.sbatch`
    """
    with errors(debug):
        echo(
            sbatch(command, nodes=nodes, gpus=gpus, cpus=cpus, time=time, warning=warning, partition=partition, job=job)
        )


def sbatch(
    command: list[str],
    *,
    nodes: int,
    gpus: int,
    cpus: int,
    time: str,
    warning: int,
    partition: str | None = None,
    job: str = "sae-train",
) -> str:
    """The text of the file. Raises ConfigError for another command, and for values that SLURM would not take."""
    if command[0] not in COMMANDS:
        raise ConfigError(
            f"{command[0]!r}: expected {', '.join(COMMANDS)} after --, as in: sae-train script -- run ..."
        )
    if not TIME.fullmatch(time):
        raise ConfigError(f"time={time!r}: expected minutes, HH:MM:SS or D-HH:MM:SS")
    for name, value in (("job", job), ("partition", partition or "x")):
        if not re.fullmatch(r"[\w.,+-]+", value):
            raise ConfigError(f"{name}={value!r}: expected letters, digits and - . _ + without spaces")
    given = {part.partition("=")[0] for part in command}
    if command[0] == "run" and not given & {"--resume", "--overwrite"}:
        command = [*command, "--resume", "auto"]
    line = f"#SBATCH --partition={partition}\n" if partition else ""
    values = {"job": job, "nodes": nodes, "gpus": gpus, "cpus": cpus, "time": time, "warning": warning}
    return TEMPLATE.format(**values, partition=line, command=shlex.join(command)).rstrip("\n")
