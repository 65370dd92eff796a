"""Runs that are killed on the device and resumed: bitwise what the uninterrupted run ends with."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.cuda_visit.part import tell
from benchmarks.cuda_visit.place import Place
from benchmarks.cuda_visit.storage import cache_of
from benchmarks.table import markdown
from sae_granary.common.finished_run import read_metrics
from sae_granary.train.state.checkpoint import list_checkpoints

TYPES = ("topk", "batchtopk")
FILES = ("sae/sae.safetensors", "optimizer.safetensors", "rng.safetensors")
SAVE_EVERY = 20


def run(at: Place) -> bool:
    """Kill each type once its first checkpoints are there; all at once, since commands mostly import."""
    n_steps = 100 if at.tiny else 400
    cache_of(at)
    with ThreadPoolExecutor(len(TYPES)) as threads:
        rows = list(threads.map(partial(_killed_and_resumed, at, n_steps), TYPES))
    passed = all(row[-1] == "yes" for row in rows)
    print(f"Runs of {n_steps} steps on {at.device}, killed (SIGKILL) and resumed by commands.\n")
    print(markdown(["type", "killed after step", "resumed from", "bitwise equal"], rows))
    return passed


def _killed_and_resumed(at: Place, n_steps: int, name: str) -> list[object]:
    whole, cut = (_start(at, name, n_steps, at.folder / f"{name}_{end}") for end in ("whole", "killed"))
    process, folder = cut  # both train at once: what matters is bits, not time
    while process.poll() is None and len(list_checkpoints(folder)) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    reached, first = read_metrics(folder)[-1]["step"], list_checkpoints(folder)[-1].name
    tell(f"{name}: killed after step {reached}, resuming from {first}")
    subprocess.run([*_command("resume"), str(folder), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    if whole[0].wait():
        raise RuntimeError(f"the run without interruption ended with {whole[0].returncode}")
    same = _weights(folder) == _weights(whole[1]) and reached < n_steps
    return [name, reached, first, "yes" if same else "NO"]


def _start(at: Place, name: str, n_steps: int, runs: Path) -> tuple[subprocess.Popen[bytes], Path]:
    sizes = {"d-sae": 128, "k": 4, "batch-size": 256} if at.tiny else {"d-sae": 12_288, "k": 32, "batch-size": 4096}
    flags = {"cache": cache_of(at), "type": name, "device": at.device, "steps": n_steps, "save-every": SAVE_EVERY}
    flags |= {**sizes, "runs-dir": runs, "name": name, "log-every": 5, "eval-rows": 4096, "keep": 3}
    arguments = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
    process = subprocess.Popen([*_command("run"), *arguments, "--quiet"], stdout=subprocess.DEVNULL)
    return process, runs / name


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "sae_granary.train.cli", name]


def _weights(folder: Path) -> list[bytes]:
    """The files of the SAE and of the last checkpoint."""
    last = list_checkpoints(folder)[-1]
    return [(folder / "sae_weights.safetensors").read_bytes(), *((last / file).read_bytes() for file in FILES)]
