"""A SLURM of one node, as root, in a folder of its own: its daemons, and the commands that talk to them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fork_kit import LIMIT, free_port

ROOT = Path(__file__).parent.parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

# Without munge, cgroups and a database. A requeued job waits for cred_expire seconds before it starts again.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no such SLURM here; None if there can."""
    if absent := [name for name in PROGRAMS if find(name) is None]:
        return f"needs SLURM (apt-get install slurm-wlm): {absent[0]} is missing"
    return "needs root: it starts the daemons of SLURM" if os.geteuid() else None


def find(program: str) -> str | None:
    """A program of SLURM, also where only root looks."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


class Slurm:
    """A running SLURM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # its jobs find torchrun
        self.env = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}

    def __call__(self, *command: object) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            [str(find(str(command[0]))), *map(str, command[1:])],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout + done.stderr

    def submit(self, script: str) -> str:
        """Submit a script; the id of its job."""
        path = self.folder / "job.sbatch"
        path.write_text(script, encoding="utf-8")
        return self("sbatch", "--parsable", path).strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self("scontrol", "show", "job", job)
        return next(part.partition("=")[2] for part in shown.split() if part.startswith(f"{name}="))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for what SLURM does; fails with what it and its jobs have said."""
        until = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < until, f"{self.output()}{self.logs()}"
            time.sleep(0.2)

    def output(self) -> str:
        """What the jobs have printed."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.out")))

    def logs(self) -> str:
        """The last lines of the daemons."""
        return "".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("slurm*.log")))


@contextmanager
def running(folder: Path) -> Iterator[Slurm]:
    """Start the daemons, and end them with what they started."""
    ports = {"ctld": free_port(), "slurmd": free_port()}
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, **ports))
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-7]\n")
    for number in range(8):  # instead of /dev/nvidia0, ...
        (folder / f"gpu{number}").touch()
    slurm, quiet = Slurm(folder), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    daemons = [
        subprocess.Popen([str(find("slurmctld")), "-D"], env=slurm.env, **quiet),
        subprocess.Popen([str(find("slurmd")), "-D", "-N", host], env=slurm.env, **quiet),
    ]
    try:
        sinfo = [str(find("sinfo")), "-h", "-o", "%t"]

        def is_idle() -> bool:
            done = subprocess.run(sinfo, env=slurm.env, capture_output=True, text=True, check=False)
            return "idle" in done.stdout

        slurm.wait_until(is_idle)
        yield slurm
    finally:
        subprocess.run([str(find("scancel")), "-f", "-u", "root", "-s", "KILL"], env=slurm.env, check=False, **quiet)
        until = time.monotonic() + LIMIT  # what a job has started ends with it, not with the daemons
        while slurm("squeue", "-h").strip() and time.monotonic() < until:
            time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
