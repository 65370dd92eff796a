"""The sbatch files of `sae-train script` and `sae-harvest script`: parsed by bash and run by a real SLURM."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_kit import invoke, refused
from fork_kit import LIMIT
from slurm_kit import Slurm, missing, running

from sae_granary.common.settings.sbatch import batch_script
from sae_granary.harvest.cli import app as harvest_app
from sae_granary.train.cli import app

RUN = ["run", "--cache", "/shared/my cache", "--type", "topk", "--k", "16"]


def script(*words: str, options: tuple[str, ...] = ()) -> str:
    """The file that `sae-train script` prints for a command."""
    text = invoke(app, "script", *options, "--", *words).stdout
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""
    return text


def test_each_rank_has_its_share_of_the_cores_and_the_command_its_flags() -> None:
    text = script(*RUN, "--stage", "$TMPDIR", options=("--nodes", "2", "--gpus", "4", "--cpus", "33"))
    assert "export OMP_NUM_THREADS=8 # per process" in text
    assert "run --cache '/shared/my cache' --type topk --k 16 --stage '$TMPDIR' --resume auto &" in text
    assert "srun --cpus-per-task=33 torchrun --nnodes=2 --nproc-per-node=4" in text
    assert {"#SBATCH --requeue", "#SBATCH --nodes=2", "#SBATCH --signal=B:USR1@180"} < set(text.splitlines())
    assert "--resume auto" not in script("resume", "runs/r")


def test_an_array_has_a_job_for_each_value() -> None:
    text = script(*RUN[:-2], options=("--array", "lr=1e-3,1e-4", "--job", "rates"))
    assert "#SBATCH --array=0-1" in text
    lines = re.findall(r"^values=.*|^value=.*|--set .*(?= &)", text, re.MULTILINE)
    for number, value in enumerate(("1e-3", "1e-4")):
        job = "\n".join([f"SLURM_ARRAY_TASK_ID={number}", *lines[:2], f"echo {lines[2]}"])
        done = subprocess.run(["bash", "-c", job], capture_output=True, text=True, check=True)
        assert done.stdout == f"--set lr={value} --name rates_lr{value}\n"


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ((*RUN, "--lyer", "3"), (), "error: sae-train run: No such option: --lyer"),
        ((*RUN, "--type", "topkk"), (), "unknown type 'topkk'"),
        ((*RUN, "--set", "kk=3"), (), "unknown setting 'kk' for type topk, did you mean 'k'?"),
        (("run", "--type", "topk"), (), "no cache was given"),
        ((*RUN, "--help"), (), "error: --help shows the flags of sae-train run, and no job needs it: leave it out"),
        ((*RUN, "--dry-run"), (), "--dry-run would end the job before it trains"),
        ((*RUN, "--overwrite"), (), "--overwrite would start anew after each stop"),
        ((*RUN, "--resume", "never"), (), "--resume never: expected auto"),
        (("sweep", *RUN[1:5], "--grid", "k=2,x"), (), "k='x': expected a whole number"),
        (("resume",), (), "sae-train resume: Missing argument"),
        (("compare", "a"), (), "'compare': expected run, sweep, resume after --"),
        (RUN[:-2], ("--array", "k=1,x"), "k='x': expected a whole number"),
        (RUN[:-2], ("--array", "k"), "--array 'k': expected a setting and its values, as in k=16,32,64"),
        (RUN, ("--array", "init_from=runs/a,runs/b"), "name='sae-train_init_fromruns/a': expected one folder name"),
        ((*RUN, "--name", "r"), ("--array", "lr=1e-3,1e-4"), "give `run`, without --name"),
        (RUN, ("--time", "soon"), "--time 'soon': expected a time as sbatch takes it"),
        (RUN, ("--job", "a b"), "--job 'a b': expected letters, digits"),
        (RUN, ("--partition", "a b"), "--partition 'a b': expected letters, digits"),
    ],
)
def test_what_the_job_would_refuse_is_refused_before(
    words: tuple[str, ...], options: tuple[str, ...], message: str
) -> None:
    assert message in refused(app, "script", *options, "--", *words)


@pytest.mark.slow
def test_slurm_stops_a_training_with_a_checkpoint_and_continues_it(make_cache, tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    words = ["run", "--cache", make_cache(), "--type", "topk", "--k", 4, "--d-sae", 64, "--steps", "100k"]
    words += ["--save-every", 0, "--save-minutes", 0, "--log-every", 1, "--device", "cpu", "--quiet"]
    words += ["--runs-dir", tmp_path / "runs", "--name", "r"]
    text = script(*map(str, words), options=("--gpus", "1", "--cpus", "1", "--time", "00:10:00"))
    harvest = ["script", "--jobs", "2", "--", "run", "--model", "demo", "--layers", "1", "--out", str(tmp_path / "h")]
    (tmp_path / "slurm").mkdir()
    with running(tmp_path / "slurm") as slurm:
        for file in (text, invoke(harvest_app, *harvest).stdout):
            (tmp_path / "job").write_text(file)
            assert "to start at" in slurm("sbatch", "--test-only", tmp_path / "job")
        job = slurm.submit(text)
        steps = steps_of(tmp_path / "runs/r", least=1, shown=slurm.output)
        slurm("scancel", "--batch", "--signal=USR1", job)
        slurm.wait_until(lambda: slurm.field(job, "Restarts") == "1")
        steps = steps_of(tmp_path / "runs/r", least=len(steps), shown=slurm.output)
        assert list((tmp_path / "runs/r/checkpoints").iterdir())
        assert steps == list(range(1, len(steps) + 1))  # none is lost, none is taken twice
        slurm("scancel", job)
        alone_in_its_array(slurm)


def alone_in_its_array(slurm: Slurm) -> None:
    """A job of an array stops and queues itself again, the others go on: the last has the number of the array."""
    job = slurm.submit(batch_script({"array": "0-1", "time": "00:10:00"}, cpus=1, warning=60, step="sleep 600"))
    running = {f"{job}_0.0", f"{job}_1.0"}
    slurm.wait_until(lambda: running <= set(slurm("squeue", "-h", "-s", "-o", "%i").split()))
    slurm("scancel", "--batch", "--signal=USR1", f"{job}_1")
    slurm.wait_until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", f"{job}_1"))
    other = slurm("scontrol", "show", "job", f"{job}_0")
    assert "JobState=RUNNING" in other
    assert "Restarts=0" in other


def steps_of(run: Path, least: int, shown: Callable[[], str]) -> list[int]:
    """The logged steps of a run, when there are more than so many."""
    until, steps = time.monotonic() + LIMIT, list[int]()
    while len(steps) <= least:
        assert time.monotonic() < until, shown()
        time.sleep(0.2)
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1] if (run / "metrics.jsonl").exists() else []
        steps = [json.loads(line)["step"] for line in lines]
    return steps
