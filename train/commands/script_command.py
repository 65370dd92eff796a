"""`sae-train script`: an sbatch file for SLURM that starts a training on all GPUs and continues it after each stop."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Sequence
from typing import Annotated

import typer

from sae_granary.common.app import Debug, echo
from sae_granary.common.errors import ConfigError
from sae_granary.common.settings.sbatch import batch_script, parsed
from sae_granary.train.commands.shared_flags import NO_CACHE, errors

COMMANDS = ("run", "sweep", "resume")
TORCHRUN = """torchrun --nnodes={} --nproc-per-node={} \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$port" \\
    -m sae_granary.train {}"""
HEAD = (
    'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    "port=$((20000 + SLURM_JOB_ID % 20000)) # jobs on one machine have ports of their own",
)
IN_NAME = ("type", "k", "d_sae", "seed", "init_seed", "hook")  # settings that the name of a run tells


def script(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(help="What to train, after --: run, sweep or resume, with all flags.")
    ],
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs of each machine; each gets a process.")] = 8,
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="CPU cores of each machine.")] = 32,
    array: Annotated[
        str | None,
        typer.Option(
            "--array", help="One job for each value of a setting: k=16,32,64. Only with run.", show_default=False
        ),
    ] = None,
    time: Annotated[str, typer.Option("--time", help="Time limit, as SLURM writes it.")] = "04:00:00",
    warning: Annotated[
        int, typer.Option("--warning", min=30, help="Seconds before the limit at which the training is stopped.")
    ] = 180,
    partition: Annotated[str | None, typer.Option("--partition", help="Partition of the cluster.")] = None,
    account: Annotated[str | None, typer.Option("--account", help="Account of the cluster.")] = None,
    job: Annotated[str, typer.Option("--job", help="Name of the job.")] = "sae-train",
    debug: Debug = False,
) -> None:
    """Print an sbatch file that trains on all GPUs of a SLURM job and continues after the time limit or a preemption.

    `sae-train script --nodes 2 --gpus 8 -- run --cache /shared/cache/gpt2_l8 --type topk > train.sbatch`
    """
    with errors(debug):
        key, values = _values(array)
        options = {
            "job-name": job,
            "array": f"0-{len(values) - 1}" if values else None,
            "partition": partition,
            "account": account,
            "nodes": nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": gpus,
            "time": time,
            "output": "%x-%j.out",
        }
        resumed = ["--resume", "auto"] if command[0] == "run" and not _has(command, "--resume") else []
        for value in values or [""]:
            check_command(context, [*command, *resumed, *_of_array(command, key, value, job)])
        step = shlex.join([*command, *resumed])
        step += "".join(f" {word}" for word in _of_array(command, key, '"$value"', job))
        before = [f"export OMP_NUM_THREADS={max(1, cpus // gpus)} # per process", *HEAD]
        before.append(f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={warning - 10} # seconds for the last checkpoint")
        if values:
            before += [f"values=({shlex.join(values)})", 'value="${values[$SLURM_ARRAY_TASK_ID]}"']
        echo(batch_script(options, cpus=cpus, warning=warning, step=TORCHRUN.format(nodes, gpus, step), before=before))


def check_command(context: typer.Context, command: Sequence[str]) -> None:
    """Check the command of a job as far as that goes without its cache. Raises ConfigError, SAEError."""
    flags = parsed(context, command, "sae-train", COMMANDS)
    if flags.get("overwrite"):
        raise ConfigError("--overwrite would start anew after each stop: remove the old run first")
    if flags.get("dry_run"):
        raise ConfigError("--dry-run would end the job before it trains: leave it out")
    if flags.get("resume") not in (None, "auto"):
        raise ConfigError(f"--resume {flags['resume']}: expected auto, so that the job continues after a stop")
    if command[0] == "resume":
        return
    from sae_granary.train.commands.sweep_command import grid_of, several
    from sae_granary.train.commands.train_command import config_of
    from sae_granary.train.config.flags import given_settings
    from sae_granary.train.folders import check_name
    from sae_granary.train.sweeps.sweep import check_request

    names = inspect.signature(given_settings).parameters
    if flags.get("name") is not None:
        check_name(flags["name"])
    given = given_settings(**{name: value for name, value in flags.items() if name in names})
    if command[0] == "sweep":
        check_request(*grid_of(given, flags["grid"] or []))
    elif grid := several(given):
        check_request(*grid)
    elif not config_of(given).cache:
        raise ConfigError(NO_CACHE)


def _has(command: Sequence[str], flag: str) -> bool:
    return any(word.partition("=")[0] == flag for word in command)


def _values(array: str | None) -> tuple[str, list[str]]:
    """The setting that differs between the jobs of an array, and its values. Raises ConfigError."""
    if array is None:
        return "", []
    key, _, text = array.partition("=")
    values = [part.strip() for part in text.split(",")]
    if not key.isidentifier() or "" in values or len(set(values)) != len(values):
        raise ConfigError(f"--array {array!r}: expected a setting and its values, as in k=16,32,64")
    return key, values


def _of_array(command: Sequence[str], key: str, value: str, job: str) -> list[str]:
    """What a job of an array has beside the command: its value, and a name of its own for its run."""
    if not key:
        return []
    if command[0] != "run" or _has(command, "--name"):
        raise ConfigError("--array starts a run with a name of its own for each value: give `run`, without --name")
    return ["--set", f"{key}={value}", *([] if key in IN_NAME else ["--name", f"{job}_{key}{value}"])]
