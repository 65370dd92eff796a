"""The sbatch file: bash parses it, and it stops and queues again as the scheduler asks it to."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_kit import invoke
from fork_kit import LIMIT

from sae_granary.harvest.cli import app

FLAGS = ["--model", "gpt2", "--layer", "8", "--dataset", "my text.jsonl", "--out", "/shared/gpt2"]


def test_bash_parses_the_file_and_the_scheduler_finds_its_lines() -> None:
    text = invoke(app, "script", "--jobs", 16, "--time", "1-00:00:00", "--", "run", *FLAGS).stdout
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False, capture_output=True).stderr == ""
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH" in line
    )
    assert (options["array"], options["time"], options["signal"]) == ("0-15", "1-00:00:00", "B:USR1@120")
    assert "requeue" in options
    assert "--dataset 'my text.jsonl' --out /shared/gpt2 --block-docs 4096 &" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--", "run", *FLAGS, "--lyer", "3"), "sae-harvest run: No such option: --lyer"),
        (("--", "run", *FLAGS, "--dtype", "flot"), "dtype='flot': expected one of"),
        (("--time", "soon", "--", "run", *FLAGS), "--time 'soon': expected a time as sbatch takes it"),
        (("--", "run", *FLAGS[:4]), "--out is missing: name the folder that all jobs share"),
        (("--jobs", "0", "--", "run", *FLAGS), "--jobs"),
        (("--", "run", *FLAGS, "--help-all"), "error: --help-all shows the flags of sae-harvest run"),
        (("--", "add", *FLAGS), "'add': expected run after --"),
    ],
)
def test_wrong_flags_are_refused(words: tuple[str, ...], message: str) -> None:
    assert message in invoke(app, "script", *words, code=2).stderr


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, "requeue 7_3\n"), (signal.SIGTERM, "")])
def test_the_job_stops_its_harvest_and_queues_itself_again(tmp_path: Path, sent: signal.Signals, requeued: str) -> None:
    for name, body in {
        "srun": f'echo $$ > {tmp_path}/pid; shift; exec "$@"',
        "scancel": f'test "$*" = "--signal=TERM 7_3.0" && kill -TERM $(cat {tmp_path}/pid)',
        "sae-harvest": f"trap 'echo stopped > {tmp_path}/stopped; exit 143' TERM; touch {tmp_path}/began; "
        "while true; do sleep 0.05; done",
        "scontrol": f'echo "$@" >> {tmp_path}/calls',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7"}
    environment |= {"SLURM_ARRAY_TASK_ID": "3"}
    text = invoke(app, "script", "--", "run", *FLAGS).stdout
    job = subprocess.Popen(["bash", "-c", text], env=environment)
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    job.send_signal(sent)
    assert job.wait(LIMIT) == 143
    assert (tmp_path / "stopped").exists()
    assert ((tmp_path / "calls").read_text() if requeued else "") == requeued
