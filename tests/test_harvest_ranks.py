"""One cache by several processes: the same bytes for any number of them, whatever happens to them on the way."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_kit import contents
from fork_kit import LIMIT, Forks, command, wait_until
from harvest_kit import CutOff, build_model, config_of, cut_off_after, packed
from meanwhile_kit import meanwhile
from test_harvest_resume import assert_same_cache, write_corpus

from sae_granary import open_cache
from sae_granary.cache.errors import CacheError, CacheMismatchError
from sae_granary.cache.format.layout import BLOCKS
from sae_granary.cache.format.records import load_manifest
from sae_granary.cache.read.verify import verify
from sae_granary.cache.write import blocks
from sae_granary.common import files
from sae_granary.common.errors import ConfigError
from sae_granary.common.signals import StopRequest
from sae_granary.common.signed import DamagedFileError
from sae_granary.harvest import progress
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.harvest.errors import NoRowsError
from sae_granary.harvest.plan import plan, plan_rows
from sae_granary.harvest.prepare import prepare
from sae_granary.harvest.progress import Progress
from sae_granary.harvest.ranks import work, world
from sae_granary.harvest.ranks.blocks import Outcome
from sae_granary.harvest.ranks.board import Board, Limits, Task
from sae_granary.harvest.ranks.lease import Lease, Leases
from sae_granary.harvest.ranks.progress import BlockProgress, Heartbeat, SummedProgress
from sae_granary.harvest.ranks.work import Worker
from sae_granary.harvest.ranks.world import World
from sae_granary.harvest.replay.growth import plan_growth
from sae_granary.harvest.run import harvest_activations
from sae_granary.harvest.spec import cache_spec
from sae_granary.models.config import WhereConfig

SLOW = pytest.mark.slow


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HarvestConfig:
    monkeypatch.setenv(world.LEASE_SECONDS, "200")  # no process that a busy machine holds up is taken for dead
    sizes = {"ctx_len": 16, "batch_tokens": 64, "rows_per_shard": 512, "block_docs": 25}
    model = build_model(tmp_path / "model", "bert")
    return config_of(model, write_corpus(tmp_path / "corpus.txt", 60), tmp_path / "one", **sizes)


def together(config: HarvestConfig, n: int) -> None:
    """Harvest one cache by n workers at once: threads, which claim blocks as processes do."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            harvest_activations(config, quiet=True)
        except BaseException as error:
            errors.append(error)
            traceback.print_exc()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []


@pytest.mark.parametrize("pack", [False, True])
def test_any_number_of_workers_gives_the_same_bytes(config: HarvestConfig, pack: bool) -> None:
    config = packed(config) if pack else config
    result = harvest_activations(config, quiet=True)
    assert not result.already_complete
    assert verify(config.out_path).ok
    for n in (4,) if pack else (2, 3):  # of three blocks
        several = replace(config, out=config.out_path.with_name(f"by_{n}"))
        together(several, n)
        assert_same_cache(several.out_path, config.out_path)


@SLOW
def test_a_process_begins_while_another_one_finishes(config: HarvestConfig) -> None:
    config = replace(config, max_docs=20)
    harvest_activations(config, quiet=True)
    want, workers = contents(config.out_path), list[Worker]()
    shutil.rmtree(config.out_path)
    prepared = prepare(config, print)

    def start() -> None:
        shutil.rmtree(config.out_path, ignore_errors=True)
        with Progress("tokens", None, quiet=True) as progress:
            workers.append(Worker(prepared, cache_spec(prepared), progress, StopRequest(), World.of_environment()))

    ends = meanwhile(lambda: workers.pop()._begin(), lambda: harvest_activations(config, quiet=True), start, 9)
    for n, _ in enumerate(ends):
        assert contents(config.out_path) == want, n
    assert n > 30


def test_the_rows_are_those_of_a_harvest_without_blocks(config: HarvestConfig) -> None:
    harvest_activations(config, quiet=True)
    harvest_activations(replace(config, out=config.out_path.with_name("plain"), block_docs=None), quiet=True)
    blocks, plain = open_cache(config.out_path), open_cache(config.out_path.with_name("plain"))
    assert (blocks.manifest.version, plain.manifest.version) == (3, 1)
    for name in ("token_id", "doc_id", "position", "doc_position", "flags"):
        assert np.array_equal(blocks.column(name)[:], plain.column(name)[:])
    assert np.allclose(blocks.hook()[:], plain.hook()[:], rtol=0, atol=1e-5)
    assert [record.block for record in blocks.records] == sorted(record.block or 0 for record in blocks.records)
    window, block = blocks.column("window")[:], blocks.column("doc_id")[:] // 25
    assert np.array_equal(window >> np.uint64(32), block.astype(np.uint64))
    assert blocks.manifest.summary == plain.manifest.summary


@pytest.mark.parametrize(
    "limit",
    [
        {"max_tokens": 700},
        pytest.param({"max_docs": 30}, marks=SLOW),
        pytest.param({"max_tokens": 10}, marks=SLOW),
        pytest.param({"max_tokens": 10**6}, marks=SLOW),
    ],
)
def test_a_limit_ends_with_the_same_document(config: HarvestConfig, limit: dict[str, int]) -> None:
    config = replace(config, **limit)
    one = harvest_activations(config, quiet=True)
    together(three := replace(config, out=config.out_path.with_name("three")), 3)
    assert_same_cache(three.out_path, config.out_path)
    plain = harvest_activations(replace(config, out=config.out_path.with_name("plain"), block_docs=None), quiet=True)
    assert (one.n_rows, one.n_docs, one.ended, one.skipped) == (plain.n_rows, plain.n_docs, plain.ended, plain.skipped)


@SLOW
def test_a_block_that_was_harvested_past_the_end_is_cut(config: HarvestConfig) -> None:
    config = replace(config, max_tokens=600)  # in the second block
    harvest_activations(config, quiet=True)
    other = replace(config, out=config.out_path.with_name("other"))
    with pytest.raises(CutOff), cut_off_after(2):
        harvest_activations(other, quiet=True)
    leases = Leases(other.out_path / BLOCKS, 1000)
    held = leases.claim("00000000.cut")  # so that the second block is taken before it is known how far it goes
    assert held is not None
    thread = threading.Thread(target=lambda: harvest_activations(other, quiet=True), daemon=True)
    thread.start()
    wait_until((other.out_path / BLOCKS / "00000001.json").exists)
    held.release()
    thread.join(LIMIT)
    assert not thread.is_alive()
    assert_same_cache(other.out_path, config.out_path)


@pytest.mark.parametrize("n_batches", [16, *(pytest.param(n, marks=SLOW) for n in (1, 4, 9, 20, 23))])
def test_a_crash_leaves_no_trace_whoever_continues(config: HarvestConfig, n_batches: int) -> None:
    harvest_activations(config, quiet=True)
    other = replace(config, out=config.out_path.with_name("other"))
    with pytest.raises(CutOff), cut_off_after(n_batches):
        harvest_activations(other, quiet=True)
    together(replace(other, block_docs=None), 2)  # the cache knows its blocks
    assert_same_cache(other.out_path, config.out_path)
    before = contents(other.out_path)
    assert harvest_activations(other, quiet=True).already_complete
    assert contents(other.out_path) == before


@SLOW
def test_without_locks_the_bytes_are_the_same(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    harvest_activations(config, quiet=True)
    monkeypatch.setattr("sae_granary.common.lock.FolderLock.acquire", lambda self: None)
    together(several := replace(config, out=config.out_path.with_name("several")), 3)
    assert_same_cache(several.out_path, config.out_path)


def test_a_block_that_another_process_has_taken_over_and_joined_ends_well(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_late(place: Path, data: bytes) -> None:
        monkeypatch.setattr(work, "write_first", files.write_first)
        for lease in place.parent.glob("*.lease"):
            lease.unlink()
        harvest_activations(config, quiet=True)
        files.write_first(place, data)

    monkeypatch.setattr(work, "write_first", write_late)
    assert harvest_activations(config, quiet=True).n_rows == open_cache(config.out_path).n_rows
    assert verify(config.out_path).ok
    assert not (config.out_path / BLOCKS).exists()


def test_a_join_that_another_process_has_taken_over_ends_well(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join_late(*args: Any) -> None:
        """By the other process first, which removes the blocks when this one has seen an unfinished cache."""
        unfinished = blocks.load_manifest(config.out_path)
        blocks.join_blocks(*args)
        blocks.remove_blocks(config.out_path)
        with monkeypatch.context() as patch:
            read = blocks.load_manifest
            patch.setattr(blocks, "load_manifest", lambda at: unfinished if at == config.out_path else read(at))
            blocks.join_blocks(*args)

    monkeypatch.setattr("sae_granary.harvest.ranks.joining.join_blocks", join_late)
    harvest_activations(config, quiet=True)
    assert verify(config.out_path).ok


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: replace(c, where=WhereConfig(layers=(2,))), "hook_points"),
        (lambda c: replace(c, tokens=replace(c.tokens, ctx_len=12)), "ctx_len"),
        (lambda c: replace(c, block_docs=26), "block_docs"),
        (lambda c: replace(c, max_tokens=100), "max_tokens"),
    ],
)
def test_workers_that_disagree_stop_with_the_field(
    config: HarvestConfig, change: Callable[[HarvestConfig], HarvestConfig], field: str
) -> None:
    with pytest.raises(CutOff), cut_off_after(1):
        harvest_activations(config, quiet=True)
    with pytest.raises(CacheMismatchError) as error:
        harvest_activations(change(config), quiet=True)
    assert list(error.value.differences) == [field]


def test_workers_of_other_versions_stop_with_the_library(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CutOff), cut_off_after(1):
        harvest_activations(config, quiet=True)
    monkeypatch.setattr("sae_granary.harvest.spec.version", lambda name: "0.1")
    with pytest.raises(CacheMismatchError, match=r"torch: the cache has '2.*', this command wants '0\.1'"):
        harvest_activations(config, quiet=True)


def test_what_cannot_be_divided_is_refused(config: HarvestConfig) -> None:
    with pytest.raises(ConfigError, match="standard input cannot be divided"):
        harvest_activations(replace(config, text=TextConfig("-")), quiet=True)
    assert not config.out_path.exists()


def test_text_without_rows_leaves_nothing(config: HarvestConfig) -> None:
    Path(config.text.dataset).write_text("\n\n \n")
    with pytest.raises(NoRowsError, match="3 empty"):
        harvest_activations(config, quiet=True)
    assert not config.out_path.exists()


def test_one_rank_of_many_needs_no_other(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "192.0.2.1")):
        monkeypatch.setenv(name, value)
    result = harvest_activations(replace(config, block_docs=None), quiet=True)
    assert open_cache(config.out_path).manifest.block_docs == world.DEFAULT_BLOCK_DOCS
    assert result.ended == "source"


def test_a_number_of_ranks_without_a_rank_is_refused(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="WORLD_SIZE=4, but RANK is not set"):
        harvest_activations(config, quiet=True)
    assert not config.out_path.exists()


def test_a_damaged_plan_is_named(config: HarvestConfig) -> None:
    with pytest.raises(CutOff), cut_off_after(1):
        harvest_activations(config, quiet=True)
    plan = config.out_path / BLOCKS / "plan.json"
    os.truncate(plan, 20)
    with pytest.raises(DamagedFileError, match=r"plan\.json cannot be read: not valid JSON .*; remove it"):
        harvest_activations(config, quiet=True)
    plan.unlink()
    assert harvest_activations(config, quiet=True).ended == "source"


def test_an_altered_outcome_of_a_block_is_named(tmp_path: Path) -> None:
    path = tmp_path / "00000000.json"
    path.write_bytes(Outcome(3, 40, 3, {"repaired": 0}, "00000000", limited=False).to_bytes())
    assert Outcome.read(path) == Outcome(3, 40, 3, {"repaired": 0}, "00000000", limited=False)
    path.write_bytes(path.read_bytes().replace(b'"n_rows": 40', b'"n_rows": 41'))
    with pytest.raises(DamagedFileError, match=r"checksum in its last line does not fit.*; remove it, and its block"):
        Outcome.read(path)


def test_blocks_that_numbers_cannot_hold_are_refused(config: HarvestConfig) -> None:
    with pytest.raises(ConfigError, match="expected a value <= 1000000000"):
        replace(config, block_docs=2**62)


def test_blocks_that_are_certainly_past_the_end_are_not_claimed(tmp_path: Path) -> None:
    leases = Leases(tmp_path, 60)
    first, second = leases.claim("00000000"), leases.claim("00000001")
    assert first is not None
    assert second is not None
    board = Board(tmp_path, 25, Limits(600, None), leases)
    assert [task.block for task in islice(board.tasks(), 4)] == [0, 1, 2, 3]
    first.renew(400)
    second.renew(250)
    assert [task.block for task in islice(board.tasks(), 4)] == [0, 1]
    assert (board.rows_in_work(), board.n_shown()) == (650, 600)
    write = Outcome(25, 380, 24, {"repaired": 0}, "00000000", limited=False).to_bytes
    (tmp_path / "00000000.json").write_bytes(write())
    docs = Board(tmp_path, 25, Limits(None, 24), leases)
    assert [task.name for task in islice(docs.tasks(), 4)] == ["00000000.cut"]


def test_a_plan_counts_blocks_and_their_short_shards(config: HarvestConfig) -> None:
    config = replace(config, rows_per_shard=256)
    planned, result = plan(config, print), harvest_activations(config, quiet=True)
    assert planned.n_blocks == 3
    assert planned.n_shards == pytest.approx(result.n_shards, abs=1)
    assert planned.n_shards > plan(replace(config, block_docs=None), print).n_shards
    assert ("blocks", "about 3 of 25 documents") in plan_rows(planned)


def test_a_plan_counts_the_columns_of_each_short_shard(config: HarvestConfig) -> None:
    few = replace(config, block_docs=5, max_docs=20, rows_per_shard=16384)
    told, have = plan(few, print), harvest_activations(few, quiet=True)
    assert told.n_bytes == pytest.approx(have.n_bytes, rel=0.05)
    more = replace(few, max_docs=30, extend=True)
    told, result = plan_growth(more, print), harvest_activations(more, quiet=True)
    assert told.n_shards == pytest.approx(result.n_shards - have.n_shards, abs=1)
    assert told.n_bytes == pytest.approx(result.n_bytes - have.n_bytes, rel=0.3)  # one shard more or less


def test_the_progress_of_rows_that_no_process_told_yet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    shown = progress.Progress("token", 100)
    shown.begin(0)
    shown.advance(0, 0)
    shown.advance(50, 1 << 20)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "0 of 100 tokens, 0 tokens/s, 0 B written"
    assert second.startswith("50 of 100 tokens, ")
    assert second.endswith(" left")


def test_a_lease_tells_its_first_rows_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = Leases(tmp_path, 120.0)
    board = Board(tmp_path, 25, Limits(None, None), leases)
    lease = leases.claim("00000000")
    assert lease is not None
    progress = BlockProgress(SummedProgress(Progress("token", 100, quiet=True), board, lambda n: 0, tells=False))
    heartbeat, pauses = Heartbeat(lease, board, progress), list[float]()
    told = list[int]()

    def waited(seconds: float) -> bool:
        pauses.append(seconds)
        told.append(leases.n_rows("00000000"))
        progress.advance(10, 0)
        return len(pauses) == 8

    monkeypatch.setattr(heartbeat._stop, "wait", waited)
    heartbeat._run()
    lease.release()
    assert pauses == [1, 2, 4, 8, 16, 20, 20, 20]  # seconds
    assert told == [0, 10, 20, 30, 40, 50, 60, 70]


def test_ranks_on_a_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    try:
        world.share_cores(world.World(0, 4, 0, 2), "cpu")
        assert torch.get_num_threads() == 4
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        world.share_cores(world.World(0, 4, 0, 2), "cpu")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_lease_is_taken_over_when_its_holder_is_silent(tmp_path: Path) -> None:
    clock = Clock()
    mine, other = Leases(tmp_path, 10), Leases(tmp_path, 10, clock)
    held = mine.claim("a")
    assert held is not None
    assert other.claim("a") is None
    for now in (9, 18, 27):  # it is renewed in time
        clock.now = now
        held.renew(5)
        assert other.claim("a") is None
    assert other.n_rows("a") == 5
    clock.now = 38
    taken = other.claim("a")
    assert taken is not None
    held.renew(6)
    assert held.lost
    assert not taken.lost
    assert mine.claim("a") is None
    taken.release()
    assert (mine.claim("a") is None, mine.claim("b") is None) == (False, False)


def test_a_lease_of_a_dead_process_is_free_at_once_on_its_host_only(tmp_path: Path) -> None:
    if (pid := os.fork()) == 0:
        Leases(tmp_path, 1000).claim("a")
        os._exit(0)
    os.waitpid(pid, 0)
    there = tmp_path / "a.0.lease"
    content = there.read_bytes()
    there.write_bytes(content.replace(b'"host": "', b'"host": "other-'))
    assert Leases(tmp_path, 1000).claim("a") is None
    there.write_bytes(content)
    assert Leases(tmp_path, 1000).claim("a") is not None
    assert Leases(tmp_path, 1000).claim("a") is None


def test_of_many_claims_one_succeeds(tmp_path: Path) -> None:
    first = Leases(tmp_path, 10).claim("a")
    assert first is not None
    first.release()
    observers = [Leases(tmp_path, 10) for _ in range(8)]
    assert all(leases.is_free("a") for leases in observers)
    assert sum(leases.claim("a") is not None for leases in observers) == 1
    (tmp_path / "b.0.lease").write_bytes(b"")  # a holder that has not written yet
    assert not Leases(tmp_path, 10).is_free("b")


@pytest.mark.parametrize("error", [errno.ENOENT, errno.ESTALE])
def test_a_lease_that_a_network_file_system_does_not_show_yet(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, clock = Leases(tmp_path, 10).claim("a"), Clock()
    assert held is not None
    other = Leases(tmp_path, 10, clock)
    open_file, unread = os.open, unreadable(error, os.open)

    def open_late(path: Path, flags: int, *mode: int) -> int:
        fd: int = (open_file if flags & os.O_CREAT else unread)(path, flags, *mode)
        return fd

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_late)
        assert other.claim("a") is None
        assert not other.is_free("a")  # its holder is there: no other attempt before it may be taken for dead
    assert other.claim("a") is None
    clock.now = 11
    assert other.claim("a") is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", unreadable(error, os.stat))
        held.renew(1)
    assert not held.lost
    held.renew(2)
    assert held.lost


def test_a_stale_file_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    monkeypatch.setattr(files, "open_regular", unreadable(errno.ESTALE, files.open_regular, times=2))
    assert files.read_regular(path) == b"content"
    monkeypatch.setattr(files, "open_regular", unreadable(errno.ESTALE, files.open_regular, times=3))
    with pytest.raises(OSError, match="Stale file handle"):
        files.read_regular(path)


def test_outcomes_that_are_removed_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "00000000.json", files.open_regular
    path.write_bytes(b"{}")

    def removed(path: Path) -> Any:
        path.unlink()
        return read(path)

    monkeypatch.setattr(files, "open_regular", removed)
    assert Outcome.read(path) is None


def unreadable(number: int, function: Callable[..., Any], times: int = 1000) -> Callable[..., Any]:
    """A function that fails so many times, as it may on a network file system."""
    left = [OSError(number, os.strerror(number))] * times

    def call(*args: Any, **more: Any) -> Any:
        if left:
            raise left.pop()
        return function(*args, **more)

    return call


def test_what_the_former_process_of_a_block_publishes_late_stays(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest_activations(config, quiet=True)
    other = replace(config, out=config.out_path.with_name("other"))
    with pytest.raises(CutOff), cut_off_after(1):
        harvest_activations(other, quiet=True)  # its lease of the first block is taken over
    fill, tasks = work.Worker._fill, []

    def fill_late(self: work.Worker, task: Task, *args: Any) -> Outcome:
        outcome = fill(self, task, *args)
        tasks.append(task.block)
        if tasks == [0]:  # the former process has published it, and this one cannot read it
            self._publish(task, outcome)
            raise CacheError("unreadable")
        assert load_manifest(other.out_path / BLOCKS / "00000000").complete
        return outcome

    monkeypatch.setattr(work.Worker, "_fill", fill_late)
    harvest_activations(other, quiet=True)
    assert tasks == [0, 0, 1, 2]
    assert_same_cache(other.out_path, config.out_path)


def harvest(config: HarvestConfig) -> None:
    """Harvest in a process of its own, which `forks` starts."""
    torch.set_num_threads(1)
    harvest_activations(config, quiet=True)


@pytest.mark.parametrize("n_kills", [1, pytest.param(20, marks=SLOW)])
def test_killed_processes_lose_and_double_nothing(config: HarvestConfig, n_kills: int, forks: Forks) -> None:
    corpus = write_corpus(config.out_path.with_name("short.txt"), 24)
    config = replace(config, text=replace(config.text, dataset=str(corpus)), block_docs=4)
    for _ in range(2):  # the first one also waits for the imports of the process that all are forked from
        shutil.rmtree(config.out_path, ignore_errors=True)
        before = time.monotonic()
        assert forks.start(harvest, config).code() == 0
        duration = time.monotonic() - before
    rng, n_left, run = np.random.default_rng(7), n_kills, 0
    while n_left:
        run += 1
        other, running, started = replace(config, out=config.out_path.with_name(f"killed_{run}")), [], []
        while n_left and not _is_complete(other.out_path):
            new = [forks.start(harvest, other) for _ in range(max(1, int(rng.integers(1, 4)) - len(running)))]
            running, started = running + new, started + new
            time.sleep(float(rng.uniform(0.0, duration)))
            for process in running if rng.integers(2) else running[:1]:  # torchrun ends all of them
                process.end()
            running = [process for process in running if process.running]
            n_left -= 1
        started += [forks.start(harvest, other) for _ in range(2)]
        assert {process.code() for process in started} <= {-signal.SIGKILL, 0}
        assert [process.code() for process in started[-2:]] == [0, 0]
        assert_same_cache(other.out_path, config.out_path)
        assert verify(other.out_path).ok


def _is_complete(path: Path) -> bool:
    return (path / "manifest.json").exists() and open_cache(path, allow_incomplete=True).complete


@SLOW
def test_processes_that_are_wrongly_taken_for_dead_do_no_damage(
    config: HarvestConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest_activations(config, quiet=True)
    monkeypatch.setattr("sae_granary.common.lock.FolderLock.acquire", lambda self: None)

    renew = Lease.renew

    def silent(lease: Lease, n_rows: int) -> None:
        if lease._next.name.endswith((".1.lease", ".2.lease")):  # of the first two processes: it comes to an end
            lease.lost = lease.lost or lease._next.exists()
        else:
            lease._told["seconds"] = 200  # as long as the others wait for the third
            renew(lease, n_rows)

    monkeypatch.setattr(Lease, "renew", silent)
    monkeypatch.setenv(world.LEASE_SECONDS, "0.3")
    together(other := replace(config, out=config.out_path.with_name("contested")), 4)
    assert_same_cache(other.out_path, config.out_path)


@SLOW
def test_torchrun_and_jobs_of_their_own_give_the_same_bytes(config: HarvestConfig, forks: Forks) -> None:
    harvest_activations(config, quiet=True)
    flags = [
        "run", "--model", config.model.model, "--dataset", config.text.dataset, "--documents", "line", "--layer", "1",
        "--ctx-len", "16", "--batch-tokens", "64", "--rows-per-shard", "512", "--device", "cpu", "--block-docs", "25",
    ]  # fmt: skip
    module, ranks, jobs = "sae_granary.harvest", config.out_path.with_name("ranks"), config.out_path.with_name("jobs")
    at_free_port = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *at_free_port, "--nproc-per-node", "2", "-m", module]
    run = [*torchrun, *flags, "--out", str(ranks)]
    ran = subprocess.run(run, check=False, capture_output=True, text=True, timeout=LIMIT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("harvested") == 1  # rank 0 prints for all
    assert_same_cache(ranks, config.out_path)
    log = ranks.joinpath("harvest.log").read_text()
    assert (len(re.findall(r"rank \d: block \d: [1-9]", log)), log.count("finished")) == (3, 1)
    several = [forks.start(command, module, *flags, "--out", str(jobs)) for _ in range(2)]
    assert [job.code() for job in several] == [0, 0]
    assert_same_cache(jobs, config.out_path)
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    wrong = forks.start(command, module, *flags, "--layer", "2", "--out", str(jobs), **env)
    assert wrong.code() == 2
    assert re.search(r"rank 1: error: \S*jobs was harvested from something else:\n  hook_points", wrong.output)
