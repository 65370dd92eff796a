"""What training on a cluster needs beside the ranks: the sbatch file, the bytes of a step, the environment."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from command_kit import invoke

from benchmarks.rank_traffic import SIZES, shard_row, step_traffic, table_row
from sae_granary.cache.load.loader import Share
from sae_granary.common.errors import ConfigError
from sae_granary.train.cli import app
from sae_granary.train.config.merge import make_config
from sae_granary.train.ranks.place import Place, place_of_process
from sae_granary.train.ranks.run import check_shared
from sae_granary.train.ranks.sweep import share_of
from sae_granary.train.ranks.world import pin_device

RUN = ["run", "--cache", "/shared/my cache", "--type", "topk"]


def test_the_sbatch_file_is_bash_and_continues_a_run(tmp_path: Path) -> None:
    flags = ["script", "--nodes", "2", "--gpus", "4", "--partition", "gpu", "--", *RUN]
    result = invoke(app, *flags)
    path = tmp_path / "train.sbatch"
    path.write_text(result.output)
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    assert "-m sae_granary.train run --cache '/shared/my cache' --type topk --resume auto &" in result.output
    assert "--nnodes=2 --nproc-per-node=4" in result.output
    assert result.output.startswith("#!/bin/bash\n#SBATCH")
    assert "#SBATCH --partition=gpu\n" in result.output


def test_the_sbatch_file_stops_the_training_and_queues_the_job_again(tmp_path: Path) -> None:
    """The script runs with stand-ins for SLURM's commands: USR1 reaches the training as TERM."""
    result = invoke(app, "script", "--gpus", "1", "--", *RUN)
    stand_ins = {
        "scontrol": 'if [ "$1" = requeue ]; then echo "requeued $2"; else echo host1; fi',
        "scancel": f'test "$*" = "--signal=TERM 7.0" && kill -TERM $(cat {tmp_path}/pid); '
        f"while kill -0 $(cat {tmp_path}/pid) 2>/dev/null; do sleep 0.01; done",  # the work ends before it does
        "srun": f"trap 'echo saved; exit 143' TERM; echo $$ > {tmp_path}/pid; kill -USR1 $PPID; "
        "while :; do sleep 0.05; done",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host[1-2]"}
    done = subprocess.run(["bash", "-c", result.output], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["saved", "requeued 7"], done
    assert done.returncode == 143


def test_bytes_of_a_step() -> None:
    """Two ranks exchange all gradients once; eight send 2 * 7/8 of them; batchtopk also sends k values per row."""
    gradients, counters = (2 * 768 * 24_576 + 24_576 + 768) * 4, 24_576 * 8
    assert step_traffic(768, 24_576, 32, 4_096, 2).sent == gradients + counters
    assert step_traffic(768, 24_576, 32, 4_096, 8).sent == 2 * 7 / 8 * (gradients + counters)
    assert step_traffic(768, 24_576, 32, 4_096, 1).sent == 0
    more = step_traffic(768, 24_576, 32, 4_096, 8, batchwise=True).sent - step_traffic(768, 24_576, 32, 4_096, 8).sent
    assert more == 7 * 512 * 32 * 4
    assert step_traffic(768, 24_576, 32, 4_096, 8).flop == 512 * (2 * 768 * 24_576 + 8 * 32 * 768)


@pytest.mark.parametrize("row", [row(*size) for row in (table_row, shard_row) for size in SIZES])
def test_the_tables_of_the_page_are_computed(row: str) -> None:
    assert row in (Path(__file__).parent.parent / "docs" / "clusters.md").read_text()


@pytest.mark.parametrize("n_rows", [7, 102, 4096])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_shares_divide_every_batch(n_rows: int, pieces: int) -> None:
    for n in (2, 3, 4):
        rows = [row for i in range(n) for lo, hi in Share(i, n, pieces).ranges(n_rows) for row in range(lo, hi)]
        assert sorted(rows) == list(range(n_rows))
        for sizes in zip(*(Share(i, n, pieces).sizes(n_rows) for i in range(n)), strict=True):
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE=2, but RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT=99999: expected"),
        ({"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=5: expected 0 to 1"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='x': expected a number"),
    ],
)
def test_an_environment_that_is_not_torchruns(env: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        place_of_process(env)


def test_one_process_trains_alone() -> None:
    assert place_of_process({}) is None
    assert place_of_process({"RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"type": "temporal"}, "type='temporal' compares the rows of a batch, which 3 ranks would divide"),
        ({"type": "topk", "loss": "kl"}, "a loss through the language model is computed by one rank, there are 3"),
        ({"type": "topk", "finetune_kl": "100"}, "a loss through the language model is computed by one rank"),
        ({"type": "topk", "batch_size": 2}, "batch_size=2 in 1 micro-batches leaves one of 3 ranks without rows"),
        ({"type": "topk", "batch_size": 8, "grad_acc_steps": 4}, "batch_size=8 in 4 micro-batches leaves one of 3"),
    ],
)
def test_what_ranks_cannot_train_as_one_process_would(given: dict[str, object], text: str) -> None:
    config = make_config([{"cache": "cache/toy", "d_sae": 64, "steps": 10, "device": "cpu", **given}])
    with pytest.raises(ConfigError, match=re.escape(text)):
        check_shared(config, 3)
    check_shared(make_config([{"cache": "cache/toy", "type": "batchtopk", "batch_size": 3, "steps": 10}]), 3)


@pytest.mark.parametrize("n_saes", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_saes_of_a_sweep_are_divided_whatever_their_number(n_saes: int, n: int) -> None:
    names = [f"sae_{i}" for i in range(n_saes)]
    assert [name for i in range(n) for name in share_of(names, Place(i, n, i, "localhost", 1))] == names


def test_a_gpu_that_another_job_uses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*size: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with pytest.raises(ConfigError, match=r"device 'cuda:1' of .* cannot be used \(CUDA error: .* busy .* nvidia-smi"):
        pin_device(Place(3, 4, 1, "localhost", 1), "cuda")
    with pytest.raises(ConfigError, match=r"rank 2 is number 2 on .*, which has 2 GPUs"):
        pin_device(Place(2, 4, 2, "localhost", 1), "cuda")
