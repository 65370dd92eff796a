"""Two hosts, each with a network, a name and processes of its own, under torchrun's rendezvous; one of them fails."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_kit import LIMIT, Forked, command, wait_until
from harvest_kit import build_model
from host_kit import Host, two_hosts  # noqa: F401
from rank_kit import COMMON
from test_harvest_resume import assert_same_cache, write_corpus
from test_train_ranks import assert_close

from sae_granary import load_sae, train_sae
from sae_granary.cache.read.verify import verify
from sae_granary.common.finished_run import read_summary
from sae_granary.harvest.pipeline import Pipeline
from sae_granary.train.ranks.trainer import RankTrainer
from sae_granary.train.state.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow

Pause = tuple[str, int]  # a file, and the batch or step before which one worker waits until the file is removed


def paused(pause: Pause, number: int, stop: Callable[[], None] = lambda: None) -> None:
    """In a worker: where this is the batch to stop at, make the file and wait until it is removed."""
    file, waited = Path(pause[0]), Path(f"{pause[0]}_waited")
    if number == pause[1] and not waited.exists():
        waited.touch()
        file.touch()
        while file.exists():
            stop()
            time.sleep(0.02)


def harvest(pause: Pause, *flags: str) -> None:
    """Harvest in this process."""
    tick, n_batches = Pipeline._tick, 0
    paused(pause, 0)

    def counted(self: Pipeline, n_rows: int) -> None:
        nonlocal n_batches
        n_batches += 1
        paused(pause, n_batches, self._check)
        tick(self, n_rows)

    Pipeline._tick = counted  # type: ignore[method-assign]
    _command("sae_granary.harvest", "run", *flags)


def train(pause: Pause, *flags: str) -> None:
    """Train in this process."""
    take = RankTrainer.take

    def counted(self: RankTrainer, *args: object) -> None:
        paused(pause, self.run.step)
        take(self, *args)  # type: ignore[arg-type]

    RankTrainer.take = counted  # type: ignore[assignment,method-assign]
    _command("sae_granary.train", "run", *flags)


def _command(module: str, *flags: str) -> None:
    try:
        command(module, *flags)
    except SystemExit as error:
        if error.code:  # torchrun waits for ever for a worker function that exits without an error
            raise


def test_a_harvest_whose_second_host_is_killed_and_starts_again(two_hosts: tuple[Host, Host], tmp_path: Path) -> None:  # noqa: F811
    a, b = two_hosts
    model, text = build_model(tmp_path / "model", "bert"), write_corpus(tmp_path / "text.txt", 60)
    flags = [
        "--model", str(model), "--dataset", str(text),
        "--documents", "line", "--layer", "1", "--ctx-len", "16", "--batch-tokens", "64", "--rows-per-shard", "128",
        "--device", "cpu", "--block-docs", "15", "--quiet",
    ]  # fmt: skip
    waits_a, waits_b, waits_again = (str(tmp_path / name) for name in ("a", "b", "again"))
    out, env = tmp_path / "two", {"GRANARY_LEASE_SECONDS": "2"}
    first = a.torchrun(0, harvest, (waits_a, 5), *flags, "--out", str(out), **env)
    second = b.torchrun(0, harvest, (waits_b, 8), *flags, "--out", str(out), **env)  # in a block, some of it committed
    wait_until(lambda: Path(waits_a).exists() and Path(waits_b).exists(), of=(first, second))
    b.kill(second)
    again = b.torchrun(0, harvest, (waits_again, 0), *flags, "--out", str(out), **env)
    wait_until(Path(waits_again).exists, of=(first, again))  # the first agent has started its worker anew
    for name in (waits_a, waits_again):
        Path(name).unlink(missing_ok=True)
    assert [(process.code(), process.output) for process in (first, again)] == [(0, first.output), (0, again.output)]
    one = b.start(command, "sae_granary.harvest", "run", *flags, "--out", str(tmp_path / "one"))
    assert one.code() == 0, one.output
    assert_same_cache(out, tmp_path / "one")
    assert verify(out).ok


def test_a_training_whose_second_host_is_cut_off_then_killed(
    two_hosts: tuple[Host, Host],  # noqa: F811
    make_cache: Callable[..., Path],
    tmp_path: Path,
) -> None:
    a, b = two_hosts
    settings = {**COMMON, "cache": str(make_cache()), "type": "batchtopk", "k": 3, "steps": 30, "save_every": 5}
    settings |= {"log_every": 1, "runs_dir": str(tmp_path)}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    flags += ["--name=run", "--resume=auto", "--quiet"]
    folder, cut_off, killed = tmp_path / "run", tmp_path / "cut_off", tmp_path / "killed"

    def start(host: Host, restarts: int, pause: Path, at: int = -1) -> Forked:
        timeout = "15" if pause == cut_off else str(LIMIT)  # a connection that is killed breaks at once
        return host.torchrun(restarts, train, (str(pause), at), *flags, GRANARY_RANK_TIMEOUT=timeout)

    first, second = start(a, 0, cut_off), start(b, 0, cut_off, 12)
    wait_until(cut_off.exists, of=(first, second))
    b.unplug()
    cut_off.unlink()
    assert first.code() == 1, first.output
    assert "error: rank 1 (host-2, process " in first.output
    wait_until(lambda: "error: rank 0 (host-1, process " in second.output)
    assert "or cannot be reached from host-2" in second.output
    b.kill(second)
    b.plug()
    assert list_checkpoints(folder)[-1].name == "step_00000010"

    first, second = start(a, 1, killed), start(b, 0, killed, 22)
    wait_until(killed.exists, of=(first, second))
    b.kill(second)
    wait_until(lambda: "rank 1 (host-2, process " in first.output, of=(first,))
    second = start(b, 0, killed)
    assert [first.code(), second.code()] == [0, 0], (first.output, second.output)
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))
    alone = train_sae(**settings, name="alone")  # type: ignore[arg-type]
    assert read_summary(folder)["tokens"] == alone.summary["tokens"]
    assert_close(load_sae(alone.folder).state_dict(), load_sae(folder).state_dict(), "trained", within=1e-3)
