"""sbatch files: a job that is stopped in time, queues itself again and continues; and the check of its command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from sae_granary.common.errors import ConfigError, shortened

TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
WORD = re.compile(r"[\w.,+-]+")

# srun ends its tasks by force when it is signaled itself, so the step is. The number of one job of an array is that
# of the whole array too, so jobs of an array are named by their index.
_SCRIPT = """\
#!/bin/bash
{options}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@{warning}

# {warning} s before the time limit SLURM sends USR1: the work is stopped, and the job is queued again; the same command
# then continues. A preempted job (TERM) is stopped in the same way, and queued again by SLURM.
{notes}
set -u
{before}
job="${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
again=0
stop() {{ scancel --signal=TERM "$job.0"; }}
trap 'again=1; stop' USR1
trap stop TERM

srun --cpus-per-task={cpus} {step} &
step=$!
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the work
    wait "$step"
done
wait "$step" # bash keeps the code of what has ended
code=$?
if [ "$again" -eq 1 ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$job"
fi
exit "$code"
"""


def batch_script(
    options: Mapping[str, Any],
    *,
    cpus: int,
    warning: int,
    step: str,
    notes: Sequence[str] = (),
    before: Sequence[str] = (),
) -> str:
    """Return the text of an sbatch file; `step` is what srun starts, on so many cores per task.

    An option is left out if it is None. Raises ConfigError for a value that SLURM does not take.
    """
    given = {name: value for name, value in {**options, "cpus-per-task": cpus}.items() if value is not None}
    if not TIME.fullmatch(time := str(given["time"])):
        raise ConfigError(f"--time {time!r}: expected a time as sbatch takes it, such as 04:00:00 or 1-00:00:00")
    for name in ("job-name", "partition", "account"):
        if name in given and not WORD.fullmatch(str(given[name])):
            flag = name.partition("-")[0]
            raise ConfigError(f"--{flag} {given[name]!r}: expected letters, digits and - . _ + without spaces")
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH --{name}={value}" for name, value in given.items()),
        notes="\n".join(notes),
        before="\n".join(before),
        cpus=cpus,
        warning=warning,
        step=step,
    )


def parsed(context: typer.Context, command: Sequence[str], program: str, allowed: Sequence[str]) -> dict[str, Any]:
    """Parse the command of a job as the program of this context does; return its parameters, not checked any further.

    Raises ConfigError for another command than the allowed ones, and for what the parser refuses.
    """
    name, *words = command
    if name not in allowed:
        raise ConfigError(f"{name!r}: expected {', '.join(allowed)} after --, as in: {program} script -- run ...")
    found = context.find_root().command.commands[name]  # type: ignore[attr-defined]
    shows = {option for param in found.get_params(context) if param.is_eager for option in param.opts}
    if asked := next((word for word in words if word in shows), None):
        raise ConfigError(f"{asked} shows the flags of {program} {name}, and no job needs it: leave it out")
    try:
        values = found.make_context(name, words).params
    except Exception as error:
        if (told := getattr(error, "format_message", None)) is None:
            raise
        words_of_parser = shortened(" ".join(told().split()))
        raise ConfigError(f"{program} {name}: {words_of_parser}") from None
    lists = {key: list(value) or None if isinstance(value, tuple) else value for key, value in values.items()}
    return lists | ({"config": Path(str(lists["config"]))} if lists.get("config") else {})
