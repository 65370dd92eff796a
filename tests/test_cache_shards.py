"""Training by groups of shards from a URL: fetched while it trains, verified, bounded, and continued bit by bit."""

import contextlib
import json
import signal
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from threading import Event

import pytest
import torch
from cache_kit import flip
from conftest import write_cache
from fork_kit import command
from rank_kit import ended, start
from safetensors.numpy import load_file
from test_cache_travel import Faulty, faulty, run  # noqa: F401

from sae_granary import open_cache, resume_sweep, resume_training, train_sae, train_sweep
from sae_granary.analyze.source import cache_of
from sae_granary.cache.convert import convert
from sae_granary.cache.errors import CacheError, CorruptCacheError
from sae_granary.cache.load.loader import Loader, Share, Shuffle, order_of
from sae_granary.cache.read.listing import list_caches
from sae_granary.cache.read.recorded import cache_paths
from sae_granary.cache.remote import fetch
from sae_granary.cache.remote.push import plan_push, push
from sae_granary.cache.remote.shards import WHOLE
from sae_granary.cache.remote.stage import staging
from sae_granary.cache.remote.store import RemoteError
from sae_granary.common.errors import ConfigError
from sae_granary.common.signals import StopRequest
from sae_granary.train.config.merge import make_config
from sae_granary.train.data import passes
from sae_granary.train.data.run_data import RunData
from sae_granary.train.data.stage import stage
from sae_granary.train.errors import CheckpointError, InterruptedRunError
from sae_granary.train.state.checkpoint import list_checkpoints
from sae_granary.train.state.identity import check_identity

URL = "faulty://b/c"
RUN = {
    "resample_every": 50, "eval_every": 40, "val_rows": 60,
    "type": "topk", "k": 3, "d_sae": 32, "batch_size": 64, "steps": 120, "shuffle_shards": 2, "pool_rows": 300,
    "eval_rows": 100, "save_every": 0, "save_minutes": 0, "dead_after_tokens": 500, "device": "cpu",
}  # fmt: skip


def weights(folder: Path) -> dict:
    return {name: t.tolist() for name, t in load_file(folder / "sae_weights.safetensors").items()}


def activations(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("activations/*/c.*") if path.is_file() and path.suffix != ".part"]


def bytes_of(folder: Path) -> int:
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size if path.is_file() and path.name != ".lock" else 0)
    return sum(sizes)


def max_shard(cache: Path) -> int:
    return max(path.stat().st_size for path in activations(cache))


def fixed_bytes(cache: Path) -> int:
    """Bytes of what is copied before the first step."""
    return bytes_of(cache) - sum(path.stat().st_size for path in activations(cache))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A cache, and the weights that the settings give on it where it is local."""
    folder = tmp_path_factory.mktemp("made")
    cache = write_cache(folder / "toy", hooks=("layer_1", "layer_3"), rows_per_shard=500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "MAX_SAMPLE_ROWS", 200)
        return cache, weights(train_sae(**settings(folder, cache=str(cache))).folder)


@pytest.fixture
def cache(made: tuple[Path, dict]) -> Path:
    return made[0]


@pytest.fixture
def plain(made: tuple[Path, dict]) -> dict:
    return made[1]


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRANARY_REMOTE_DIR", str(tmp_path / "copies"))
    monkeypatch.setattr(passes, "MAX_SAMPLE_ROWS", 200)
    return tmp_path / "copies"


@pytest.fixture
def pushed(cache: Path, faulty: type[Faulty], monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:  # noqa: F811
    monkeypatch.setattr(fetch, "BLOCK_BYTES", 16 << 10)
    push(plan_push(cache, URL))
    faulty.n_requests = 0
    return faulty


def settings(tmp_path: Path, name: str = "r", **more) -> dict:
    return {**RUN, "hook": ("layer_3",), "cache": URL, "runs_dir": str(tmp_path / "runs"), "name": name, **more}


def test_the_same_weights_from_a_url_within_the_bound(cache, pushed, copies, plain, tmp_path, monkeypatch) -> None:
    shard = max(f.stat().st_size for f in activations(cache))
    bound, seen, requested, began = fixed_bytes(cache) + 5 * shard, [], [], []
    read = pushed.cat_file

    def counted(self, path, start=None, end=None, **kwargs):
        seen.append(bytes_of(copies))
        requested.append(path)
        return read(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(pushed, "cat_file", counted)
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(bound))
    result = train_sae(**settings(tmp_path), callbacks=[lambda event: began.append(len(requested))], verify=True)
    assert weights(result.folder) == plain
    assert max(seen) <= bound
    late = [path for path in requested if "activations/layer_3/c." in path]
    assert not [path for path in requested if "activations/layer_1/c." in path]
    assert 2 <= len({path for path in requested[: began[0]] if path in late}) <= 6  # those groups that come first
    assert len(set(late)) == len(open_cache(cache).shards) > 8
    assert len(late) > len(set(late))  # dropped, and fetched again
    assert f"cache: {URL}" in (result.folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="name it: --cache"):
        cache_of(result.folder)  # the copy is no whole cache
    assert "shuffle_shards" in json.loads((result.folder / "run.json").read_text())["order"]


def test_later_epochs_read_the_copies(pushed, copies, plain, tmp_path) -> None:
    train_sae(**settings(tmp_path))
    pushed.n_requests, pushed.faults = 0, dict.fromkeys(range(1, 10_000), "error")
    assert weights(train_sae(**settings(tmp_path, "again")).folder) == plain  # out of reach


def test_a_run_whose_remote_fails_ends_with_a_checkpoint_and_continues_bit_by_bit(
    cache, pushed, copies, plain, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 4 * max_shard(cache)))

    def fails(event) -> None:
        if event.step == 20:
            pushed.faults = dict.fromkeys(range(1, 100_000), "error")

    with pytest.raises(RemoteError, match=r"after 6 tries: .*; step \d+ is saved: `sae-train resume .*/r` continues"):
        train_sae(**settings(tmp_path), callbacks=[fails])
    folder = tmp_path / "runs/r"
    assert [path for path in (folder / "checkpoints").glob("step_*") if path.name > "step_00000020"]
    pushed.faults = {n: ("error", "short", "wrong")[n % 3] for n in range(3, 100_000, 40)}
    assert weights(resume_training(folder).folder) == plain


def test_a_wrong_byte_never_trains(pushed, copies, plain, tmp_path) -> None:
    name = next(name for name in pushed.store if name.endswith("activations/layer_3/c.0.0"))
    right = pushed.store[name].getvalue()
    pushed().pipe_file(name, bytes([right[0] ^ 1]) + right[1:])
    with pytest.raises(CorruptCacheError, match=r"layer_3/c\.0\.0: the checksum does not fit"):
        train_sae(**settings(tmp_path))
    assert not [path for path in activations(copies) if path.name == "c.0.0"]
    pushed().pipe_file(name, right)
    assert weights(train_sae(**settings(tmp_path), resume="auto").folder) == plain


def test_groups_that_do_not_fit_are_refused_before_a_run_begins(cache, pushed, copies, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 4 * max_shard(cache) - 1))
    with pytest.raises(CacheError, match=r"two groups of 2 shards of faulty://b/c take .* lower --shuffle-shards"):
        train_sae(**settings(tmp_path))
    assert not (tmp_path / "runs").exists()
    assert not activations(copies)


def test_hook_points_that_train_together_are_one_group(cache, pushed, tmp_path, monkeypatch) -> None:
    common = {key: value for key, value in settings(tmp_path, "s").items() if key != "hook"}
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 8 * max_shard(cache) - 1))
    with pytest.raises(CacheError, match="two groups of 2 shards of faulty://b/c take"):
        train_sweep({"hook": ["layer_1", "layer_3"]}, **common)
    assert not (tmp_path / "runs").exists()


def test_copies_that_are_dropped_while_they_are_counted_still_count(cache, pushed, monkeypatch) -> None:
    opened = open_cache(URL, by_shard=True)
    fetcher = opened.fetcher
    fetcher.fetch(fetcher.files(["layer_3"], range(4)), lambda file: file.is_here, lambda: False)
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 4 * max_shard(cache)))
    fetcher, dropped = open_cache(URL, by_shard=True).fetcher, activations(opened.path)
    free = fetcher._free

    def drops() -> int:
        found = free()
        while dropped:
            dropped.pop().unlink()  # another process does, between the two counts
        return found

    fetcher._free = drops
    fetcher.check(["layer_3"], 2)


def test_ranks_need_a_third_group(cache, pushed, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 4 * max_shard(cache)))
    data = RunData.open(make_config([settings(tmp_path)]))
    stage(data, copy=False)
    with pytest.raises(CacheError, match="three groups of 2 shards of faulty://b/c take"):
        stage(replace(data, share=Share(0, 2)), copy=False)


def test_a_damaged_copy_is_told_before_a_run_and_fetched_again(pushed, copies, plain, tmp_path, monkeypatch) -> None:
    train_sae(**settings(tmp_path))
    flip(damaged := activations(copies)[0])
    with pytest.raises(CorruptCacheError, match=r"c\.\d+\.0 is damaged: .*; remove it, and the next run"):
        train_sae(**settings(tmp_path, "again"), verify=True)
    damaged.unlink()
    assert weights(train_sae(**settings(tmp_path, "again"), verify=True).folder) == plain


@pytest.mark.parametrize(
    ("step", "more"), [(38, {}), (45, {"resample_rows": 3000, "dead_after_tokens": 64, "k": 1}), (120, {})]
)
def test_a_remote_that_fails_in_a_validation_a_resampling_or_the_end_costs_no_step(
    cache, pushed, plain, tmp_path, monkeypatch, step, more
) -> None:
    wanted = weights(train_sae(**settings(tmp_path, "local", cache=str(cache), **more)).folder) if more else plain
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 4 * max_shard(cache)))
    begun = []

    def fails(event) -> None:
        begun.append(event.step)
        if event.step == step:
            pushed.faults = dict.fromkeys(range(1, 100_000), "error")

    with pytest.raises(RemoteError, match=r"; step \d+ is saved: `sae-train resume .*/r` continues") as error:
        train_sae(**settings(tmp_path, **more), callbacks=[fails])
    assert f"step {begun[-1]} is saved" in str(error.value)
    pushed.faults = {}
    assert weights(resume_training(tmp_path / "runs/r").folder) == wanted


def test_a_whole_copy_is_read_where_there_is_one(pushed, copies, plain, tmp_path) -> None:
    open_cache(URL)
    requests = pushed.n_requests
    assert weights(train_sae(**settings(tmp_path)).folder) == plain
    assert pushed.n_requests - requests < 20
    assert len(list(copies.iterdir())) == 1


def test_a_disk_of_this_machine_gets_groups_of_shards(cache, plain, tmp_path, monkeypatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    bound = fixed_bytes(cache) + 4 * max_shard(cache)
    monkeypatch.setattr("sae_granary.cache.remote.fetch.Copy.__eq__", None)  # of a million files, none with each
    for module in ("stage", "mirror"):
        monkeypatch.setattr(f"sae_granary.cache.remote.{module}.free_bytes", lambda place: bound - bytes_of(disk))
    with staging(disk):
        seen: list[int] = []
        step = [lambda event: seen.append(bytes_of(disk))]
        result = train_sae(**settings(tmp_path, cache=str(cache)), callbacks=step)
    assert weights(result.folder) == plain
    assert 0 < max(seen) <= bound
    assert 0 < len(activations(disk)) < len(open_cache(cache).shards)
    assert list(disk.glob(f"*/{WHOLE}"))  # else who begins to read all copies could miss that some are dropped


def test_a_sweep_reads_groups_of_shards_and_continues_after_a_failure(cache, pushed, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 4 * max_shard(cache)))

    def fails(event) -> None:
        if event.step == 20:
            pushed.faults = dict.fromkeys(range(1, 100_000), "error")

    common = {key: value for key, value in settings(tmp_path).items() if key not in ("name", "k")}
    told = r"after 6 tries: [^;]*; step \d+ is saved: `sae-train resume \S*/s` continues$"
    with pytest.raises(RemoteError, match=told):
        train_sweep({"k": [2, 3]}, **common, name="s", callbacks=lambda config: [fails])
    pushed.faults = {}
    sweep = resume_sweep(tmp_path / "runs/s")
    assert weights(next(sweep.folder.glob("*k3*"))) == weights(train_sae(**settings(tmp_path)).folder)


def test_two_loaders_share_the_space_of_two_groups(cache, pushed, monkeypatch) -> None:
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 4 * max_shard(cache)))
    opened, local = open_cache(URL, by_shard=True), open_cache(cache)
    orders = [Shuffle(seed, pool_rows=300, shuffle_shards=2) for seed in (0, 1)]
    with ExitStack() as stack:
        ours, plain = (
            [stack.enter_context(Loader(c, "layer_3", batch_size=50, order=order)) for order in orders]
            for c in (opened, local)
        )
        for _ in range(100):
            for a, b in zip(ours, plain, strict=True):
                assert torch.equal(next(a).x, next(b).x)


def test_int8_rows_arrive_with_their_scales(make_cache, faulty, tmp_path) -> None:  # noqa: F811
    cache = tmp_path / "int8"
    convert(make_cache(), cache, "int8")
    push(plan_push(cache, URL))
    options = {"batch_size": 200, "order": Shuffle(3, 400, shuffle_shards=2), "epochs": 2, "with_rows": True}
    with Loader(open_cache(URL, by_shard=True), **options) as ours, Loader(open_cache(cache), **options) as plain:
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.row_ids, b.row_ids)


def test_a_loader_that_is_closed_stops_fetching_and_the_next_one_continues(cache, pushed, monkeypatch) -> None:
    opened, read, asked, go = open_cache(URL, by_shard=True), pushed.cat_file, Event(), Event()

    def slow(self, path, start=None, end=None, **kwargs):
        if len(activations(opened.path)) >= 2:  # the first group is here
            asked.set()
            go.wait(30)
        return read(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(pushed, "cat_file", slow)
    loader = Loader(opened, "layer_3", batch_size=50, order=Shuffle(0, 300, shuffle_shards=2))
    next(loader)
    assert asked.wait(30)
    loader.close()
    go.set()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("granary-ahead")]:
        thread.join(30)
    assert len(activations(opened.path)) == 2
    with Loader(opened, "layer_3", batch_size=50, order=Shuffle(0, 300, shuffle_shards=2), epochs=1) as again:
        assert sum(batch.n_rows for batch in again) == again.n_rows


def test_a_stop_does_not_wait_for_shards(cache, pushed, plain, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 4 * max_shard(cache)))
    stop, read = StopRequest(), pushed.cat_file
    opened = open_cache(URL, by_shard=True)

    def stops(self, path, start=None, end=None, **kwargs):
        if len(activations(opened.path)) >= 2 and "/c." in path:
            stop.signum = signal.SIGTERM
        return read(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(pushed, "cat_file", stops)
    opened.fetcher.stopped = lambda: bool(stop)
    loader = Loader(opened, "layer_3", batch_size=50, order=Shuffle(0, 300, shuffle_shards=2), epochs=1)
    with pytest.raises(CacheError, match="stopped while shards were fetched"):
        list(loader)
    assert len(activations(opened.path)) < 4
    stop.signum = None
    with pytest.raises(InterruptedRunError):
        train_sae(**settings(tmp_path), stop=stop)
    monkeypatch.setattr(pushed, "cat_file", read)
    assert weights(train_sae(**settings(tmp_path), resume="auto").folder) == plain


@pytest.mark.parametrize("at", [1, 22, 37])  # the second is in a validation, which saves nothing
def test_a_stop_says_which_step_is_saved(at, pushed, plain, tmp_path, monkeypatch, cache) -> None:
    monkeypatch.setenv("GRANARY_REMOTE_BYTES", str(fixed_bytes(cache) + 4 * max_shard(cache)))
    stop, read, asked = StopRequest(), pushed.cat_file, []

    def stops(self, path, start=None, end=None, **kwargs):
        asked.append("/activations/" in path and "/c." in path)
        if sum(asked) >= at:  # several threads ask
            stop.signum = signal.SIGTERM
        return read(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(pushed, "cat_file", stops)
    with pytest.raises(InterruptedRunError) as stopped:
        train_sae(**settings(tmp_path), stop=stop)
    saved = list_checkpoints(tmp_path / "runs/r")
    assert stopped.value.step == (int(saved[-1].name[5:]) if saved else 0)
    monkeypatch.setattr(pushed, "cat_file", read)
    assert weights(train_sae(**settings(tmp_path), resume="auto").folder) == plain


def test_commands_say_what_a_copy_is(cache, pushed, copies) -> None:
    copy = open_cache(URL, by_shard=True).path
    (entry,) = list_caches(copies)
    assert (entry.state, entry.n_bytes) == ("partial", bytes_of(copy))
    error = run("verify", copy, code=2).stderr
    assert "is a copy of which runs fetch what they read: give the URL of the cache" in error
    assert error.count("\n") == 1
    other = copies / "mine.shards"  # a cache with such a name
    copytree(cache, other)
    assert "complete" in run("ls", other).stdout
    assert "relative" in cache_paths(other, copies)


def test_versions_without_groups_refuse_their_checkpoints(cache) -> None:
    opened = open_cache(cache)
    orders = [
        order_of(opened, ["layer_3"], Shuffle(0, shuffle_shards=n), batch_size=64).to_json() for n in (None, 2, 3)
    ]
    for other in orders[1:]:
        with pytest.raises(CheckpointError, match="shuffle_shards"):
            check_identity({"cache": {}, "order": other}, {"cache": {}, "order": orders[0]}, Path("x"))
    assert "shuffle_shards" not in orders[0]


@pytest.mark.slow
def test_ranks_of_a_machine_share_groups_of_shards(cache, copies, tmp_path, forks) -> None:
    found = []
    for name, place in (("local", str(cache)), ("fetched", f"file://{cache}")):
        values = {**settings(tmp_path, name, cache=place), "hook": "layer_3", "steps": 40}
        flags = [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        jobs = [(command, "sae_granary.train", "run", *flags)] * 2
        bound = str(fixed_bytes(cache) + 6 * max_shard(cache))
        for code, output in ended(start(forks, jobs, GRANARY_REMOTE_BYTES=bound, GRANARY_RANK_TIMEOUT="60")):
            assert code == 0, output
        found.append(weights(tmp_path / "runs" / name))
    assert found[0] == found[1]
    assert 2 <= len(activations(copies)) < len(open_cache(cache).shards)
